"""The report of a run: what stands in it, what is left out, and how a browser shows it."""

import base64
import builtins
import copy
import dataclasses
import html.parser
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest

from experiments import markup, plots, report
from experiments.report import Example
from mgjax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
NASTY = ['a <b> & "c"', "it's 犬 $x$ {y}", "</style><script>alert(1)</script>", "under_score_that_is_rather_long"]
SECTIONS = {  # heading → what must be taken from the summary for it to go
    "Accuracy by level": ["test", "levels"],
    "What is taken for what": ["test", "confusion"],
    "Decoders": ["test", "decoders"],
    "What an answer costs": ["points"],
    "What training cost": ["stages"],
    "How it was made": ["config"],
}


def figures(accuracy):
    names = ("accuracy", "top5", "precision", "recall", "f1", "ece")
    values = {p + n: round(accuracy - 0.01 * i - 0.05 * bool(p), 4) for p in ("", "raw_") for i, n in enumerate(names)}
    count = [0, 0, *range(13)]
    confidence = [None if not n else (i + 0.5) / 15 for i, n in enumerate(count)]
    bins = {"confidence": confidence, "accuracy": [None if not n else min(1, i / 15) for i, n in enumerate(count)]}
    return values | {"reliability": bins | {"count": count}}


@pytest.fixture
def summary():
    levels = {"coarse": 0.9132, "fine": 0.7468}
    val = lambda *names: {"examples": 20, "levels": {n: figures(levels[n] - 0.1) for n in names}}
    stage = lambda name, steps, *names, **v: {
        "name": name,
        "steps": steps,
        "seconds": 83.2,
        "flops": 1.5e12,
        **v,
        "val": val(*names),
    }
    point = lambda name, params, **accuracy: {
        "name": name, "granularities": [name] if name != "all" else ["coarse", "fine"], "tasks": list(accuracy),
        "params": params, "flops": 12_345_678, "latency_ms": {"1": 1.234, "64": 45.6}, "accuracy": accuracy,
    }  # fmt: skip
    return {
        "experiment": "imagenet_mg",
        "dataset": "tfds:some_set",
        "seed": 3,
        "command": 'python -m experiments.imagenet_mg --config.data.source="<x>"',
        "date": "2026-01-02",
        "hardware": "1 × cpu; 2 cores",
        "config": {"preset": "taps", "model.widths": [64, 128], "data.dir": ""},
        "params": 1_263_608,
        "train_flops": 1.2999e14,
        "steps": 240,
        "seconds": 946.09,
        "stages": [
            stage("coarse", 20, "coarse", params=1111, point="coarse"),
            stage("fine", 100, "fine", params=2222, point="fine"),
            stage("joint", 120, "coarse", "fine", params=3333, point=None),
        ],
        "points": [point("coarse", 1000, coarse=0.8), point("fine", 2000, fine=0.7), point("all", 2500, **levels)],
        "test": {
            "examples": 1200,
            "levels": {name: figures(a) for name, a in levels.items()},
            "confusion": {"level": "coarse", "labels": NASTY, "counts": (np.eye(4, dtype=int) * 290 + 1).tolist()},
            "full_path_accuracy": 0.7468,
            "inconsistency": 0.0,
            "raw_inconsistency": 0.1234,
            "tree_distance": 1.2738,
            "mistake_severity": None,
            "decoders": {
                "combined": {"full_path_accuracy": 0.7468, "accuracy": {"coarse": 0.9132, "fine": 0.7468}},
                "top_down": {"full_path_accuracy": 0.7333, "accuracy": {"coarse": 0.8632, "fine": 0.7333}},
            },
        },
    }  # fmt: skip


@pytest.fixture
def records():
    stages = [("coarse", 20, ["coarse"]), ("fine", 120, ["fine"]), ("joint", 240, ["coarse", "fine"])]
    result, step = [], 0
    for name, end, heads in stages:
        while step < end:
            step += 10
            of = {f"{kind}/{h}": 1 / (1 + step + len(h)) for kind in ("loss", "accuracy") for h in heads}
            result.append({"step": step, "stage": name, "loss": 1.0 / step, "learning_rate": 0.3, "grad_norm": 1.0, **of})
        result.append({"step": step, **{f"val/{h}/accuracy": 0.5 for h in heads}, "val/full_path_accuracy": 0.4})
    return result


@pytest.fixture
def examples(rng):
    image = lambda *shape: rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return [
        Example(image(8, 8), 17, {"coarse": NASTY[0], "fine": NASTY[1]}, {"coarse": NASTY[0], "fine": NASTY[1]},
                {"coarse": 0.931, "fine": 0.512}),
        Example(image(400, 300), 18, {"coarse": NASTY[0], "fine": NASTY[2]}, {"coarse": NASTY[0], "fine": NASTY[3]},
                {"coarse": 0.771, "fine": 0.443}),
        Example(image(8, 8), 19, {"coarse": None, "fine": None}, {"coarse": "x", "fine": "y"}, {"coarse": 0.7, "fine": 0.4}),
    ]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Elements, ids, references and the cells of tables of a document whose tags must balance."""

    VOID = {"meta", "img", "wbr", "br", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.headings, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open or tag == "path", f"<{tag}/> is of SVG alone"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings[-1] += data

    def find(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def without(summary, path):
    summary = copy.deepcopy(summary)
    at = summary
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return summary


def test_a_report_is_one_well_formed_file_that_loads_nothing(summary, records, examples):
    text = report.render(summary, records, examples)
    assert text == report.render(summary, records, examples)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and page.find("html", lang="en") and page.find("meta", charset="utf-8")
    assert page.find("meta", name="viewport")[0]["content"] == "width=device-width, initial-scale=1"
    assert not page.find("script") and not page.find("link") and "@import" not in text
    assert not re.search("https?://", text)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) > 50
    used = [a[k] for _, a in page.elements for k in ("src", "href", "srcset", "data", "poster", "action") if k in a]
    used += re.findall(r"url\(([^)]*)\)", text)
    for reference in used:
        assert reference.startswith("data:image/png;base64,") or reference[1:] in ids, reference
    assert all(a.get("aria-hidden") or a["aria-label"] for a in page.find("svg"))
    assert all(a["alt"] for a in page.find("img"))


def test_names_are_escaped(summary, records, examples):
    summary["dataset"] = summary["stages"][0]["name"] = NASTY[2]
    summary["test"]["levels"] = {NASTY[0]: figures(0.9), NASTY[1]: figures(0.8)}
    summary["test"]["decoders"][NASTY[3]] = {"full_path_accuracy": 0.5, "accuracy": {}}
    renamed = [
        {k.replace("coarse", NASTY[0]).replace("fine", NASTY[1]) if isinstance(k, str) else k: v for k, v in r.items()}
        for r in records
    ]
    page = Page(report.render(summary, renamed, examples))
    assert not page.find("script") and not page.find("b") and page.find("svg")
    for name in NASTY:
        assert name in page.text
    assert page.headings[0] == f"imagenet_mg on {NASTY[2]}"


def test_text_that_xml_and_utf8_cannot_hold(summary, records):
    summary["test"]["levels"] = {"a\x00b": figures(0.9), "\ud800": figures(0.8), "\uffff": figures(0.7)}
    assert Page(report.render(summary, records)).text.encode().count("\N{REPLACEMENT CHARACTER}".encode()) > 6


def test_figures_are_those_of_the_summary(summary, records, examples):
    page = Page(report.render(summary, records, examples))
    cells = [tuple(row) for row in page.rows]
    assert ("coarse", "decoded", "91.32%", "90.32%", "89.32%", "88.32%", "87.32%", "0.8632") in cells
    assert ("fine", "raw", "69.68%", "68.68%", "67.68%", "66.68%", "65.68%", "0.6468") in cells
    assert ("combined (the answer)", "91.32%", "74.68%", "74.68%") in cells
    assert ("top down", "86.32%", "73.33%", "73.33%") in cells
    assert ("coarse", "1,000", "12.3 M", "1.23", "45.6", "80.00%", "–") in cells
    assert ("all", "2,500", "12.3 M", "1.23", "45.6", "91.32%", "74.68%") in cells
    assert ("fine", "100", "1:23", "1.50 T", "2,222", "–", "64.68%") in cells
    assert ("model.widths", "[64, 128]") in cells and ("data.dir", '""') in cells
    for said in (
        "1,200 examples",
        "240 steps, 15:46",
        "1,263,608 parameters, 130 TFLOP",
        "2026-01-02, seed 3",
        "12.34%",
        "1.274",
        "ECE 0.8632",
        "image 18",
    ):
        assert said in page.text, said
    titles = [a["title"] for a in page.find("td") if "title" in a]
    assert (
        len(titles) == 16
        and f"{NASTY[0]} → {NASTY[0]}: 291 of 294" in titles
        and f"{NASTY[0]} → {NASTY[1]}: 1 of 294" in titles
    )
    assert next(row[1:] for row in cells if row[0] == NASTY[1]) == ("·", "99", "·", "·")


def test_examples_say_what_is_right_and_wrong(examples):
    page = Page(report.render({}, [], examples))
    assert [a["class"] for a in page.find("div") if a.get("class", "").startswith("verdict")] == [
        "verdict right", "verdict wrong", "verdict "]  # fmt: skip
    for said in ("✓ right", "✗ wrong: fine", "truth unknown", f"true: {NASTY[2]}", "44.3%"):
        assert said in page.text
    sizes = [cv2.imdecode(np.frombuffer(base64.b64decode(a["src"].partition(",")[2]), np.uint8), 1) for a in page.find("img")]
    assert [s.shape for s in sizes] == [(8, 8, 3), (256, 192, 3), (8, 8, 3)]
    text = dataclasses.replace(examples[1], shown="Is <b> a tag_of & HTML?")
    long = dataclasses.replace(text, shown="word " * 1000)
    assert len(Page(report.render({}, [], [long])).text) < 1000
    page = Page(report.render({}, [], [text]))
    assert "Is <b> a tag_of & HTML?" in page.text and not page.find("img") and "text 18" in page.text
    np.testing.assert_array_equal(sizes[0][..., ::-1], examples[0].shown)


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_section_without_figures_is_left_out(heading, summary, records, examples):
    starts = lambda page: {h.partition(":")[0] for h in page.headings[1:]}
    whole = starts(Page(report.render(summary, records, examples)))
    assert set(SECTIONS) | {"Training, stage by stage", "Examples", "Can its confidence be trusted?"} == whole
    left = starts(Page(report.render(without(summary, SECTIONS[heading]), records, examples)))
    gone = {heading} | ({"Can its confidence be trusted?"} if heading == "Accuracy by level" else set())
    assert left == whole - gone


def test_summaries_with_little_in_them(summary, records, examples):
    assert Page(report.render({})).headings == ["Report of a run"]
    page = Page(report.render({"experiment": "ratings", "test": {"examples": 7, "rmse": 0.91234}}, [{"step": 1, "loss": 2.0}]))
    assert page.headings[0] == "ratings" and "rmse" in page.text and "0.9123" in page.text
    assert "Training, stage by stage" in page.headings and "Accuracy by level" not in page.headings
    assert "Training, stage by stage" not in Page(report.render(summary, [], examples)).headings
    assert "Examples" not in Page(report.render(summary, records)).headings
    for level in summary["test"]["levels"].values():
        del level["reliability"]
    summary["test"]["confusion"] = {"level": "coarse", "labels": ["x"] * 61, "counts": np.eye(61).tolist()}
    left = Page(report.render(summary, records)).headings
    assert not [h for h in left if "confidence" in h or "taken for" in h]
    summary["stages"] = [{"name": "only", "steps": None}]
    summary["points"] = [{"name": "only"}]
    summary["test"]["levels"]["coarse"] = {"accuracy": None}
    assert ("only", "–", "–", "–") in [tuple(r) for r in Page(report.render(summary, records)).rows]


def test_tasks_stand_beside_their_baselines():
    test = {"examples": 7, "tasks": {"rating": {"rmse": 0.9, "ndcg@10": 0.2}}, "baselines": {"mean": {"rmse": 1.1}}}
    page = Page(report.render({"experiment": "ratings", "test": test}))
    assert "Tasks" in page.headings
    assert [tuple(r) for r in page.rows if r[0] in ("rmse", "ndcg@10")] == [
        ("rmse", "0.9000", "1.1000"),
        ("ndcg@10", "0.2000", "–"),
    ]


def test_heads_of_one_task_have_rows_and_lines_of_their_own(summary, records):
    summary["test"]["heads"] = {"fine_a": figures(0.6), "fine_b": figures(0.5)}
    page = Page(report.render(summary, records))
    assert ["fine", "fine_a", "60.00%"] in [r[:3] for r in page.rows]
    styles = plots.line_styles(["coarse", "fine_a", "fine_b"], ["coarse", "fine"])
    assert styles["fine_a"]["color"] == styles["fine_b"]["color"] != styles["coarse"]["color"]
    assert styles["fine_a"]["linestyle"] != styles["fine_b"]["linestyle"]
    assert plots.level_of("fine_a", ["fi", "fine"]) == "fine" and plots.level_of("finer", ["fine"]) is None


def test_curves_break_at_stages_and_long_ones_are_averaged(records):
    steps, values = plots.curve(records, "loss/coarse")
    assert steps.tolist() == [10, 20, 20, *range(130, 241, 10), 240] and np.isnan(values[[2, -1]]).all()
    many = [{"step": i, "stage": "s", "loss": float(i)} for i in range(1, 3001)]
    steps, values = plots.curve(many, "loss", gaps=False)
    assert len(steps) == plots.MOST_POINTS and steps[0] == values[0] == 5.5
    assert plots.curve([], "loss")[0].size == 0


def test_stages_of_summary_or_records(summary, records):
    spans = [("coarse", 0, 20), ("fine", 20, 120), ("joint", 120, 240)]
    assert plots.spans(summary, []) == plots.spans({}, records) == spans
    assert not plots.names_fit(spans) and plots.names_fit(spans[1:])
    assert "1 coarse, 2 fine, 3 joint" in Page(report.render(summary, records)).text


def test_colours_of_a_plot_are_those_of_the_page(summary, records):
    text = report.render(summary, records)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in drawings and "var(--hue0)" in drawings and "font-family" not in drawings
    assert not [c for c in plots.LIGHT.values() if c in drawings] and not re.search(r"#[0-9a-f]{6}\b", drawings)
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= {*plots.LIGHT, *re.findall(r"--(\w+):", text)}
    assert set(plots.LIGHT) == set(plots.DARK) and len(report.SHAPES) == len(plots.HUES)


def test_plots_leave_matplotlib_as_it_was(summary, records):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.render(summary, records)
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_late_and_without_pyplot():
    code = (
        "import sys; from experiments import compare, report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.render({'test': {'levels': {'a': {'accuracy': 0.5}}}})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_write(tmp_path, summary, records, examples):
    lines = [json.dumps(r) for r in reversed(records)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "7", "{}", '{"step": 250, "lo']))
    by_step = lambda found: sorted((json.dumps(r, sort_keys=True) for r in found), key=lambda r: (json.loads(r)["step"], r))
    read = report.read_records(tmp_path / "metrics.jsonl")
    assert by_step(read) == by_step(records) and [r["step"] for r in read] == sorted(r["step"] for r in records)
    (tmp_path / "config.json").write_text(json.dumps({"config": {"of.the.record": 1}}))
    del summary["config"]
    path = report.write(tmp_path, summary, examples)
    assert path == tmp_path / "report.html" and "config" not in summary
    page = Page(path.read_text(encoding="utf-8"))
    assert ["of.the.record", "1"] in page.rows and "Training, stage by stage" in page.headings
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "config.json", "report.html"}
    assert report.read_records(tmp_path / "none.jsonl") == []


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, summary):
    imported = builtins.__import__

    def absent(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"pip install 'mgjax\[report\]'"):
        report.render(summary)


def test_figures_or_a_dash():
    assert [markup.share(v) for v in (0.12345, 1, None, float("nan"), True)] == ["12.35%", "100.00%", "–", "–", "–"]
    assert [plots.si(v) for v in (999_600, 999.4, 1e21)] == ["1.00 M", "999 ", "1.00 Z"]


MEASURE = """
<body style="margin:0"><iframe style="width:WIDTHpx;height:HEIGHTpx;border:0;display:block" srcdoc="REPORT"></iframe>
<pre id="measured"></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, crossed = [];
  for (const drawn of page.querySelectorAll("figure > svg")) {
    const texts = [...drawn.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
        crossed.push(drawn.getAttribute("aria-label") + ": " + a + " × " + b);
    }));
  }
  const small = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
  const {scrollWidth: width, scrollHeight: height} = page.documentElement;
  const columns = getComputedStyle(page.querySelector(".plots")).gridTemplateColumns.split(" ").length;
  const measured = {width, height, crossed, smallest: Math.min(...small), columns};
  document.querySelector("#measured").textContent = JSON.stringify(measured);
  console.log("measured");
};
</script></body>
"""


@pytest.fixture(scope="session")
def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    return pytest.skip("no chromium, chromium-browser or google-chrome on PATH to show the report")


def shown(browser, tmp_path, text, width, height):
    """(measures, console, picture) of a page in a frame of that size; the browser's minimum width does not matter."""
    wrapper, shot = tmp_path / f"{width}.html", tmp_path / f"{width}.png"
    filled = MEASURE.replace("WIDTH", str(width)).replace("HEIGHT", str(height)).replace("REPORT", html.escape(text))
    wrapper.write_text("<!DOCTYPE html><meta charset=utf-8>" + filled, encoding="utf-8")
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars " \
        "disable-component-update disable-sync disable-dev-shm-usage enable-logging=stderr dump-dom"  # fmt: skip
    process = subprocess.Popen(
        [browser, *(f"--{o}" for o in options.split()), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
         f"--window-size={max(width, 500)},{height}", wrapper.as_uri()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    try:
        dom, said = process.communicate(timeout=120)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and its helpers
        except ProcessLookupError:
            pass
        process.wait()
    found = re.search(r'<pre id="measured">(.+?)</pre>', dom)
    assert found, f"the page was not measured: {said[-2000:]}"
    console = re.findall(r"CONSOLE.*", said)
    return json.loads(html.unescape(found[1])), console, cv2.imread(str(shot))[:, :width]


def test_in_a_browser_on_a_phone_and_on_a_desk(browser, tmp_path, summary, records, examples):
    labels = [f"label_number_{i}_of_many" for i in range(20)]
    summary["test"]["confusion"] |= {"labels": labels, "counts": (np.eye(20, dtype=int) * 50 + 2).tolist()}
    text = report.render(summary, records, examples * 3)
    for width, columns in ((360, 1), (1200, 2)):
        measured, console, picture = shown(browser, tmp_path, text, width, 2400)
        assert measured["width"] == width, "the page is wider than the screen"
        assert measured["columns"] == columns and measured["height"] > 1500
        assert not measured["crossed"] and measured["smallest"] > 9
        assert len(console) == 1 and "measured" in console[0], console
        assert picture.shape[:2] == (2400, width) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
        ink = (picture.max(2) < 120).any(1)  # rows with something dark
        assert ink.mean() > 0.3 and all(part.any() for part in np.array_split(ink, 12))
