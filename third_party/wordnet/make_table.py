"""Makes `synsets.tsv`: the given WordNet 3.0 noun synsets and all their ancestors.

    python make_table.py DATA_NOUN WNIDS > synsets.tsv

DATA_NOUN is WordNet's `data.noun` (its format: wndb(5WN)); WNIDS a file with one wnid a line. A wnid is "n" and the
eight digits of the synset's offset in that file. A synset with several hypernyms hangs below the first.
"""

import pathlib
import sys

HEADER = "# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. See the file LICENSE beside this one.\n"


def read_synsets(path: str | pathlib.Path) -> dict[str, tuple[str, list[str]]]:
    """wnid → (wnid of the first hypernym, or "" at the root; lemmas)."""
    synsets = {}
    for line in pathlib.Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence
            continue
        # offset file type count (lemma id)* pointers (symbol offset part source)* | gloss
        fields = line.partition(" | ")[0].split()
        end = 4 + 2 * int(fields[3], 16)
        pointers = zip(fields[end + 1 :: 4], fields[end + 2 :: 4])
        hypernyms = [f"n{offset}" for symbol, offset in pointers if symbol in ("@", "@i")]
        synsets[f"n{fields[0]}"] = (hypernyms[0] if hypernyms else "", fields[4:end:2])
    return synsets


def make_table(data_noun: str | pathlib.Path, wnids: list[str]) -> str:
    """The table as text: wnid, parent and lemmas (separated by commas), sorted by wnid."""
    synsets = read_synsets(data_noun)
    if unknown := [w for w in wnids if w not in synsets]:
        sys.exit(f"{data_noun} does not know {', '.join(unknown[:5])}: are they noun offsets of WordNet 3.0?")
    needed = set()
    for wnid in wnids:
        while wnid and wnid not in needed:
            needed.add(wnid)
            wnid = synsets[wnid][0]
    rows = (f"{wnid}\t{synsets[wnid][0]}\t{','.join(synsets[wnid][1])}\n" for wnid in sorted(needed))
    return HEADER + "wnid\tparent\tlemmas\n" + "".join(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.stdout.write(make_table(sys.argv[1], pathlib.Path(sys.argv[2]).read_text().split()))
