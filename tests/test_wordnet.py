"""The table of WordNet's synsets, and the levels that are cut from it."""

import collections
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from mgjax.taxonomy import TaxonomyError, wordnet

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "third_party" / "wordnet"
SYNSETS = wordnet.read_table()
ILSVRC = sorted(set(SYNSETS) - {s.parent for s in SYNSETS.values()})  # no class of it is another's ancestor
CAT, TENCH, RETRIEVER, CAR, DALMATIAN, BUS = "n02123045", "n01440764", "n02099601", "n04285008", "n02110341", "n03769881"


def sizes(tree, level):
    """Name → number of classes."""
    names = tree.names[tree.index(level)]
    return collections.Counter(names[i] for i in tree.ancestors(tree.levels[-1], level))


def test_the_table_is_a_tree_of_the_1000_classes():
    assert len(ILSVRC) == 1000 and len(SYNSETS) == 1808
    assert [s.name for s in SYNSETS.values() if not s.parent] == ["entity"]
    for wnid in ILSVRC:
        seen = [wnid]
        while SYNSETS[seen[-1]].parent:
            seen.append(SYNSETS[seen[-1]].parent)
            assert len(seen) < 30
    lines = (FOLDER / "synsets.tsv").read_text(encoding="ascii").splitlines()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in lines[0] and lines[2:] == sorted(lines[2:])
    assert "PROVIDED" in (FOLDER / "LICENSE").read_text() and "LICENSE" in (FOLDER / "README.md").read_text()


def test_the_classes_are_those_of_tfds():
    tfds = pathlib.Path(importlib.metadata.distribution("tensorflow_datasets").locate_file("tensorflow_datasets"))
    assert (tfds / "datasets" / "imagenet2012" / "labels.txt").read_text().split() == ILSVRC


def test_the_script_makes_the_table_byte_for_byte(tmp_path):
    source = pathlib.Path(os.environ.get("WORDNET_DIR", "/usr/share/wordnet")) / "data.noun"
    if not source.is_file():
        pytest.skip(f"no WordNet at '{source}' (apt-get install wordnet-base, or WORDNET_DIR)")
    wnids = tmp_path / "wnids"
    wnids.write_text("\n".join(ILSVRC))
    made = subprocess.run([sys.executable, FOLDER / "make_table.py", source, wnids], capture_output=True, check=True)
    assert made.stdout == (FOLDER / "synsets.tsv").read_bytes()


def test_the_script_reads_wordnets_format(tmp_path):
    """On a few lines of that format: licence, two hypernyms, an instance, several words."""
    noun = tmp_path / "data.noun"
    noun.write_text(
        "  1 This software and database is being provided to you  \n"
        "00000001 03 n 01 thing 0 001 ~ 00000002 n 0000 | what there is\n"
        "00000002 03 n 02 animal 0 beast 1 001 @ 00000001 n 0000 | it moves @ will\n"
        "00000003 03 n 01 pet 0 001 @ 00000001 n 0000 | it stays\n"
        "00000004 03 n 01 dog 0 003 #m 00000001 n 0000 @ 00000002 n 0000 @ 00000003 n 0000 | it barks\n"
        "00000005 03 n 01 Rex 0 001 @i 00000004 n 0000 | he barks\n"
    )
    wnids = tmp_path / "wnids"
    wnids.write_text("n00000005\n")
    run = lambda: subprocess.run([sys.executable, FOLDER / "make_table.py", noun, wnids], capture_output=True, text=True)
    rows = [line.split("\t") for line in run().stdout.splitlines()[2:]]
    assert rows == [
        ["n00000001", "", "thing"],
        ["n00000002", "n00000001", "animal,beast"],
        ["n00000004", "n00000002", "dog"],
        ["n00000005", "n00000004", "Rex"],
    ]
    wnids.write_text("n00000009\n")
    assert run().returncode == 1 and "does not know n00000009" in run().stderr


def test_the_table_is_found_in_a_checkout_and_where_it_was_installed(tmp_path, monkeypatch):
    assert wordnet.table_path() == FOLDER / "synsets.tsv"
    # Installed: the package's own list of files, or a folder beside the package.
    package = tmp_path / "lib" / "mgjax" / "taxonomy"
    monkeypatch.setattr(wordnet, "__file__", str(package / "wordnet.py"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(TaxonomyError, match="install mgjax again"):
        wordnet.table_path()
    beside = tmp_path / "lib" / "share" / "mgjax" / "wordnet" / "synsets.tsv"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert wordnet.table_path() == beside
    listed = tmp_path / "share" / "synsets.tsv"
    listed.parent.mkdir()
    listed.touch()

    class File:
        name = "synsets.tsv"

        def locate(self):
            return listed

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    assert wordnet.table_path() == listed


def test_an_installed_package_has_the_table_and_its_licence():
    options = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    packed = {FOLDER.parents[1] / path for path in options["share/mgjax/wordnet"]}
    assert packed == {FOLDER / "synsets.tsv", FOLDER / "LICENSE", FOLDER / "README.md"} and all(p.is_file() for p in packed)


def test_ids_of_classes_are_the_order_given():
    wnids = ILSVRC[::-7]
    tree = wordnet.taxonomy(wnids)
    assert tree.levels == ("groups5", "groups27", "class")
    assert tree.names[-1][0] == SYNSETS[wnids[0]].name and len(tree.names[-1]) == len(wnids)
    assert not any(flags.any() for flags in tree.inherited)
    assert tree == wordnet.taxonomy(wnids)


def test_levels_of_all_1000_classes():
    tree = wordnet.taxonomy(ILSVRC, ["groups:10", "groups:50"])
    assert [tree.size(l) for l in tree.levels] == [10, 50, 1000]
    coarse = sizes(tree, "groups10")
    assert coarse["dog"] == 118 and max(coarse.values()) < 160 and min(coarse.values()) > 70
    assert max(sizes(tree, "groups50").values()) <= 35
    fine = dict(zip(tree.names[1], tree.parents[1]))
    assert tree.names[0][fine["terrier"]] == "dog" and tree.names[0][fine["snake"]] == "other vertebrate"
    # Words of several synsets are told apart.
    assert {n for n in tree.names[2] if "crane" in n} == {"crane (wading bird)", "crane (lifting device)"}
    assert wordnet.taxonomy(ILSVRC).levels == ("groups10", "groups100", "class")


def test_groups_nest_whichever_others_are_asked_for():
    wnids = ILSVRC[::9]
    both, one = wordnet.taxonomy(wnids, ["groups:4", "groups:12"]), wordnet.taxonomy(wnids, ["groups:12"])
    assert sizes(both, "groups12") == sizes(one, "groups12")


@pytest.mark.parametrize(
    "items",
    [
        ["depth:2", "depth:4", "depth:7"],
        ["depth:4", "groups:40"],
        ["groups:6", "depth:6"],
        ["k=named:animal+other", "groups:9"],
    ],
)
def test_levels_of_different_kinds_nest(items):
    tree = wordnet.taxonomy(ILSVRC[::5], items)
    for level in tree.levels[:-1]:
        assert sum(sizes(tree, level).values()) == 200
    counts = [tree.size(l) for l in tree.levels]
    assert counts == sorted(set(counts))


def test_levels_by_depth():
    tree = wordnet.taxonomy(ILSVRC, ["depth:1", "depth:4"])
    assert sizes(tree, "depth1") == {"physical entity": 997, "abstraction": 3}
    assert sizes(tree, "depth4")["artifact"] == 516


def test_levels_by_name():
    wnids = [CAT, CAR, TENCH, DALMATIAN, BUS]
    tree = wordnet.taxonomy(wnids, ["realm=named:animal+conveyance", "kind=named:dog+other"])
    assert tree.levels == ("realm", "kind", "class")
    assert tree.names[:2] == (("animal", "conveyance"), ("other animal", "conveyance", "dog"))
    assert tree.parents[2].tolist() == [0, 1, 0, 2, 1]
    assert wordnet.taxonomy(wnids, ["named:n02084071+other"]).names[0] == ("other", "dog")
    # A synset below another: the nearest counts.
    assert wordnet.taxonomy(wnids, ["named:dog+animal+other"]).names[0] == ("other animal", "other", "dog")


def test_a_class_above_another_class():
    dog = "n02084071"
    tree = wordnet.taxonomy([dog, DALMATIAN, CAT, CAR], ["named:dog+other", "groups:3"])
    assert tree.names == (("dog", "other"), ("dog", "tabby", "sports car"), ("dog", "dalmatian", "tabby", "sports car"))
    assert tree.paths.tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 2], [1, 2, 3]]


@pytest.mark.parametrize("classes, groups", [(1, []), (2, []), (3, [2]), (4, [2, 3]), (10, [2, 5]), (83, [4, 19])])
def test_defaults_adapt_to_the_number_of_classes(classes, groups):
    assert wordnet.default_levels(classes) == (*(f"groups:{n}" for n in groups), "class")
    tree = wordnet.taxonomy(ILSVRC[:: 1000 // classes][:classes])
    assert [tree.size(l) for l in tree.levels] == [*groups, classes]


@pytest.mark.parametrize(
    "wnids, items, says",
    [
        ([CAT, "n00000000"], (), "does not know 'n00000000'.*data.taxonomy"),
        ([CAT, CAT], (), "'n02123045' is given twice"),
        ([], (), "at least one class"),
        ([CAT, CAR], ["genus"], "knows no level 'genus': an item is groups:N"),
        ([CAT, CAR], ["depth:x"], "knows no level 'depth:x'"),
        ([CAT, CAR], ["named:"], "knows no level 'named:'"),
        ([CAT, CAR, TENCH], ["groups:3"], "3 groups cannot be made of 3 classes"),
        ([CAT, CAR, TENCH], ["groups:1"], "has 1 groups, no more than one, which answers no question"),
        ([CAT, CAR, TENCH, BUS], ["groups:3", "groups:2"], "has 3 groups, no more than the 3 of the level above"),
        ([CAT, CAR, TENCH], ["depth:19"], "as many groups as there are classes"),
        ([CAT, CAR, TENCH, BUS], ["groups:2", "a=class", "b=groups:3"], "'b=groups:3' cannot follow"),
        ([CAT, CAR, TENCH, BUS], ["a=groups:2", "a=groups:3"], "two levels are called 'a'"),
        ([CAT, CAR, TENCH], ["named:animal+plant"], "'plant' is no synset above these classes"),
        ([CAT, CAR, TENCH], ["named:animal"], r"1 classes are below none of 'animal': sports car; name more, or add '\+other'"),
        (ILSVRC, ["named:crane+other"], r"'crane' is the word of several synsets; give the wnid: n\d+ \(crane"),
    ],
)
def test_what_makes_no_levels_is_refused(wnids, items, says):
    with pytest.raises(TaxonomyError, match=says):
        wordnet.taxonomy(wnids, items)


def test_another_table(tmp_path):
    path = tmp_path / "synsets.tsv"
    path.write_text("wnid\tparent\tlemmas\nn00000001\t\tthing\nn00000002\tn00000001\ta\nn00000003\tn00000001\tb\n")
    assert wordnet.taxonomy(["n00000003", "n00000002"], table=path).names == (("b", "a"),)
    for text, says in [
        ("n00000002\tn00000001\ta\n", "'n00000002' is an orphan"),
        ("# x\nn00000002 n00000001 a\n", "line 2: a row is wnid"),
    ]:
        path = tmp_path / f"{len(text)}.tsv"
        path.write_text(text)
        with pytest.raises(TaxonomyError, match=says):
            wordnet.read_table(path)
    with pytest.raises(TaxonomyError, match="cannot be read"):
        wordnet.read_table(tmp_path / "none.tsv")
    path = tmp_path / "cycle.tsv"
    path.write_text("n00000001\tn00000002\ta\nn00000002\tn00000001\tb\n")
    with pytest.raises(TaxonomyError, match="cycle"):
        wordnet.taxonomy(["n00000001"], table=path)
