"""The report of a run: one HTML file that needs no network, for a phone as for a wide screen, light and dark.

`write` puts `report.html` into a workdir; `render` makes its text. A section whose figures the summary lacks is left out.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from experiments import markup, plots
from experiments.markup import breakable, escape
from mgjax.train.monitor import clock

STYLE = pathlib.Path(__file__).with_name("report.css")
LONGEST = 400  # characters of a text that is shown
LARGEST = 256  # pixels; larger example images are reduced
SHAPES = (  # of plots.MARKERS
    "M15 1.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 1 0 0-9z",
    "M11 2h8v8h-8z",
    "M15 1l5 9.5h-10z",
    "M15 .5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "M15 11l5-9.5h-10z",
    "M10 6l9.5 5v-10z",
)
MOST_LABELS = 60  # of a confusion matrix that can be read
WORDS = {
    "full_path_accuracy": ("full path", "right at every level"),
    "raw_inconsistency": ("raw inconsistency", "contradicting heads"),
    "inconsistency": ("decoded inconsistency", "0 by construction"),
    "tree_distance": ("tree distance", "mean edges, answer to truth"),
    "mistake_severity": ("mistake severity", "mean height of the mistakes"),
}
SHARES = ("full_path_accuracy", "raw_inconsistency", "inconsistency")
DECODERS = {
    "combined": "combined",
    "product": "product of all levels",
    "lifted": "finest, lifted",
    "top_down": "top down",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One test example with what the model said.

    Attributes:
        shown: an image, uint8 [H, W, 3], RGB, or a text.
        index: of the example in the test split.
        truth: level → name, None where the label is unknown.
        answer: level → name of the decoded answer.
        probability: level → probability of that answer.
    """

    shown: np.ndarray | str
    index: int
    truth: Mapping[str, str | None]
    answer: Mapping[str, str]
    probability: Mapping[str, float]


def write(workdir: pathlib.Path, summary: Mapping, examples: Sequence[Example] = ()) -> pathlib.Path:
    """Writes `report.html` of a finished run, whole or not at all, and returns its path.

    Curves come from the workdir's `metrics.jsonl`, the config, where the summary has none, from its `config.json`.

    Raises:
        InputError: matplotlib is not installed.
    """
    if "config" not in summary and (workdir / "config.json").exists():
        summary = {**summary, "config": json.loads((workdir / "config.json").read_text()).get("config", {})}
    text = render(summary, read_records(workdir / "metrics.jsonl"), examples)
    path = workdir / "report.html"
    part = workdir / ".report.html.part"
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def read_records(path: pathlib.Path) -> list[dict]:
    """The records of a `metrics.jsonl` in order of their steps; a line cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), (int, float)):
            records.append(record)
    return sorted(records, key=lambda r: r["step"])


def render(summary: Mapping, records: Sequence[Mapping] = (), examples: Sequence[Example] = ()) -> str:
    """The report as the text of an HTML document.

    Args:
        summary: of `summary.json`; every part may be missing.
        records: of `metrics.jsonl`.
        examples: of the test split, in the order in which they are shown.

    Raises:
        InputError: matplotlib is not installed.
    """
    plots.require()
    levels = _levels(summary, records)
    title = " on ".join(str(summary[k]) for k in ("experiment", "dataset") if summary.get(k)) or "Report of a run"
    sections = (
        _headline(summary, levels, title),
        _accuracy(summary, levels),
        _tasks(summary),
        _curves(summary, records, levels),
        _contributions(summary, records, levels),
        _examples(examples),
        _confusion(summary),
        _reliability(summary, levels),
        _decoders(summary, levels),
        _costs(summary, levels),
        _stages(summary, levels),
        _config(summary),
    )
    colours = lambda palette: " ".join(f"--{k}: {v};" for k, v in palette.items())
    style = f":root {{ {colours(plots.LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {colours(plots.DARK)} }} }}\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(s for s in sections if s)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(summary: Mapping, levels: Sequence[str], title: str) -> str:
    test = summary.get("test") or {}
    tiles = []
    for level in levels:
        figures = (test.get("levels") or {}).get(level)
        if figures:
            raw = figures.get("raw_accuracy")
            more = f"accuracy (raw\u00a0{markup.share(raw)})" if raw is not None else "accuracy"
            tiles.append(markup.tile(level, markup.share(figures.get("accuracy")), more, _hue(levels, level)))
    known = [k for k in WORDS if k in test and k != "inconsistency"]
    others = [k for k, v in test.items() if k not in (*WORDS, "examples") and markup.is_number(v)]
    for key in (*known, *others):
        name, more = WORDS.get(key, (key.replace("_", " "), ""))
        value = markup.share(test[key]) if key in SHARES else markup.number(test[key], ".3f" if key in WORDS else ".4g")
        tiles.append(markup.tile(name, value, more))
    facts = [
        (
            "test split",
            f"{markup.number(test.get('examples'), ',')} examples, read after training; nothing is chosen by them"
            if "examples" in test
            else "",
        ),
        ("training", _training(summary)),
        ("date, seed", ", ".join(str(v) for v in (summary.get("date"), _seed(summary)) if v is not None)),
        ("hardware", summary.get("hardware")),
        ("command", summary.get("command")),
    ]
    shown = "".join(f"<dt>{k}</dt><dd>{markup.command(v) if k == 'command' else escape(v)}</dd>\n" for k, v in facts if v)
    return (
        f"<header>\n<h1>{breakable(title)}</h1>\n"
        + (f'<dl class="tiles">\n{"".join(tiles)}</dl>\n' if tiles else "")
        + (f'<dl class="facts">\n{shown}</dl>\n' if shown else "")
        + "</header>"
    )


def _accuracy(summary: Mapping, levels: Sequence[str]) -> str:
    test = summary.get("test") or {}
    found = {l: test["levels"][l] for l in levels if (test.get("levels") or {}).get(l)}
    if not found:
        return ""
    drawn = plots.raw_against_decoded({l: (v.get("raw_accuracy"), v.get("accuracy")) for l, v in found.items()})
    names = {"accuracy": "accuracy", "top5": "top-5", "precision": "precision", "recall": "recall", "f1": "F1", "ece": "ECE"}
    rows = []
    heads = test.get("heads") or {}
    for level, figures in found.items():
        for prefix, answer in (("", "decoded"), ("raw_", "raw")):
            if f"{prefix}accuracy" in figures:
                rows.append((level, answer, *(_figure(figures, f"{prefix}{k}") for k in names)))
        rows += [(level, h, *(_figure(v, k) for k in names)) for h, v in heads.items() if plots.level_of(h, levels) == level]
    table = markup.table(("level", "answer", *names.values()), rows, texts=2)
    return markup.section(
        "Accuracy by level",
        "Raw is what a level's own heads answer. Decoded is the path that the decoder makes of what all heads answer.",
        f'<div class="plots pair">{_drawn(drawn, "accuracy", "Test accuracy: an open dot is raw, a filled one decoded.")}'
        f"<div>{table}</div></div>"
        '<p class="note">Precision, recall and F1 are means over classes; ECE is the expected calibration error (15 bins).</p>',
    )


def _tasks(summary: Mapping) -> str:
    """Figures of tasks that are no levels, beside those of baselines."""
    test = summary.get("test") or {}
    columns = dict(test.get("tasks") or {}) | {f"({name})": v for name, v in (test.get("baselines") or {}).items()}
    if not columns:
        return ""
    rows = [
        (metric, *(markup.number(v.get(metric), ".4f") for v in columns.values()))
        for metric in dict.fromkeys(k for v in columns.values() for k in v)
    ]
    return markup.section(
        "Tasks",
        "What is asked beside levels, metric by metric; baselines stand in brackets." if test.get("baselines") else "",
        markup.table(("metric", *columns), rows, texts=1),
    )


def _curves(summary: Mapping, records: Sequence[Mapping], levels: Sequence[str]) -> str:
    heads = list(dict.fromkeys(k.partition("/")[2] for r in records for k in r if k.startswith(("loss/", "accuracy/"))))
    place = {l: i for i, l in enumerate(levels)}
    heads.sort(key=lambda h: place.get(plots.level_of(h, levels), len(levels)))
    styles = plots.line_styles(heads, levels)
    stages = plots.spans(summary, records)
    losses = plots.losses(records, stages, styles)
    accuracies = plots.accuracies(records, stages, styles, levels)
    if not losses and not accuracies:
        return ""
    validated = {l: i % len(plots.HUES) for i, l in enumerate(levels) if any(f"val/{l}/accuracy" in r for r in records)}
    keys = [(h, _swatch(s, validated.get(h))) for h, s in styles.items()]
    colour = lambda level: {"color": plots.LIGHT[_hue(levels, level)]}
    keys += [(f"{l}, validation", _swatch(colour(l), i)) for l, i in validated.items() if l not in styles]
    legend = "".join(f"<li>{swatch}<span>{breakable(name)}</span></li>" for name, swatch in keys)
    figures = ""
    if losses:
        rate = ", and the learning rate" if any("learning_rate" in r for r in records) else ""
        figures += _drawn(losses, "loss", f"Loss of training batches by head{rate}.")
    if accuracies:
        figures += _drawn(
            accuracies,
            "curves",
            "Accuracy of training batches, as augmented, by head (lines), and of the decoded answer on validation (markers).",
        )
    numbered = ""
    if stages and not plots.names_fit(stages):
        numbered = "Stages: " + ", ".join(f"{i + 1} {name}" for i, (name, *_) in enumerate(stages)) + "."
    return markup.section(
        "Training, stage by stage",
        f"Shades part the stages. {numbered}" if stages else "",
        f'<ul class="legend">{legend}</ul><div class="plots">{figures}</div>',
    )


def _contributions(summary: Mapping, records: Sequence[Mapping], levels: Sequence[str]) -> str:
    parts = list(dict.fromkeys(k.split("/", 2)[2] for r in records for k in r if k.startswith("part/")))
    if not parts:
        return ""
    kinds = ("granularity_", "penalty_")
    heads = [p for p in parts if not p.startswith(kinds)]
    styles = plots.line_styles(heads, levels)
    for kind, dashes in zip(kinds, plots.DASHES[1:]):
        of_kind = plots.line_styles([p.removeprefix(kind) for p in parts if p.startswith(kind)], levels)
        styles |= {f"{kind}{p}": look | {"linestyle": dashes} for p, look in of_kind.items()}
    legend = "".join(f"<li>{_swatch(look)}<span>{breakable(p.replace('_', ' ', 1))}</span></li>" for p, look in styles.items())
    stages, figures = plots.spans(summary, records), ""
    for of, said in (
        ("loss", "What each head, as it is weighed, and each penalty adds to the loss."),
        ("gradient", "The norm of the gradient by all parameters that move: of each head, of what passes through each "
         "granularity into the branches, and of each penalty."),
    ):  # fmt: skip
        if drawn := plots.contributions(records, stages, styles, of):
            figures += _drawn(drawn, f"part-{of}", said)
    return markup.section(
        "What contributes",
        "Heads are drawn through, granularities dashed, penalties dotted; both scales are logarithmic.",
        f'<ul class="legend">{legend}</ul><div class="plots">{figures}</div>',
    )


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = "".join(_card(e) for e in examples)
    return markup.section(
        "Examples",
        "Test examples with the decoded answer and its probability at each level; beneath a wrong answer, the truth.",
        f'<div class="examples">{cards}</div>',
    )


def _card(example: Example) -> str:
    wrong = [l for l, a in example.answer.items() if example.truth.get(l) is not None and example.truth[l] != a]
    known = any(example.truth.get(l) is not None for l in example.answer)
    kind, verdict = (
        ("wrong", f"✗ wrong: {', '.join(wrong)}") if wrong else ("right", "✓ right") if known else ("", "truth unknown")
    )
    path = " › ".join(example.truth[l] if example.truth.get(l) is not None else markup.DASH for l in example.answer)
    rows = ""
    for level, answer in example.answer.items():
        truth = example.truth.get(level)
        mark, outcome = ("·", "") if truth is None else ("✓", "right") if truth == answer else ("✗", "wrong")
        rows += (
            f'<div class="said {outcome}"><span class="mark">{mark}</span><span>{breakable(answer)}</span>'
            f'<span class="share">{markup.share(example.probability.get(level), 1)}</span>'
            f'<span class="where">{escape(level)}</span>'
            + (f'<span class="truth">true: {breakable(truth)}</span>' if outcome == "wrong" else "")
            + "</div>"
        )
    if isinstance(example.shown, str):
        text = textwrap.shorten(example.shown, LONGEST, placeholder=" …")
        shown, kind_shown = f"<blockquote>{breakable(text)}</blockquote>", "text"
    else:
        tiny = ' class="tiny"' if max(example.shown.shape[:2]) < 96 else ""
        shown = f'<img{tiny} alt="test image {example.index}, true {escape(path)}" src="{image_uri(example.shown)}">'
        kind_shown = "image"
    return (
        f'<article class="example {kind_shown}"><div>{shown}<div class="index">{kind_shown} {example.index}</div></div>'
        f'<div><div class="verdict {kind}">{escape(verdict)}</div>{rows}</div></article>\n'
    )


def _confusion(summary: Mapping) -> str:
    confusion = (summary.get("test") or {}).get("confusion") or {}
    labels, counts = confusion.get("labels") or [], np.array(confusion.get("counts") or [], np.int64)
    if not 2 <= len(labels) <= MOST_LABELS or counts.shape != (len(labels), len(labels)):
        return ""
    totals = counts.sum(1)
    cell = 2.6 if len(labels) <= 8 else 1.7 if len(labels) <= 30 else 1.5
    head = "".join(f'<th scope="col" title="{escape(l)}"><span>{escape(l)}</span></th>' for l in labels)
    body = ""
    for i, label in enumerate(labels):
        cells = ""
        for j, count in enumerate(counts[i].tolist()):
            hit = " hit" if i == j else ""
            if not count:
                cells += f'<td class="{hit.strip()}"></td>' if hit else "<td></td>"
                continue
            share = count / totals[i]
            strength = 0.12 + 0.88 * math.sqrt(share)  # small shares are what one looks for
            said = f"{100 * share:.0f}" if share >= 0.005 else "·"
            title = escape(f"{label} → {labels[j]}: {count} of {totals[i]}")
            cells += (
                f'<td class="{"high" if strength > 0.6 else ""}{hit}" style="--a:{strength:.2f}" title="{title}">{said}</td>'
            )
        body += f'<tr><th scope="row" title="{escape(label)}"><span>{escape(label)}</span></th>{cells}</tr>\n'
    worst = sorted(
        ((counts[i, j], i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j), key=lambda w: -w[0]
    )
    often = [f"{breakable(labels[i])} → {breakable(labels[j])} ({n:,} of {totals[i]:,})" for n, i, j in worst[:5] if n]
    return markup.section(
        f"What is taken for what: {confusion.get('level', '')}".rstrip(": "),
        "Each row shows, in %, how the test examples of one label were answered (decoded). Empty: none; a dot: below 0.5 %.",
        f'<div class="scroll"><table class="heat" style="--cell:{cell}rem">'
        f"<thead><tr><th class='axis'>true ↓ &nbsp; answer →</th>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>"
        + (f'<p class="note">Most frequent, truth → answer: {"; ".join(often)}.</p>' if often else ""),
    )


def _reliability(summary: Mapping, levels: Sequence[str]) -> str:
    found = (summary.get("test") or {}).get("levels") or {}
    figures = ""
    for i, level in enumerate(levels):
        bins = (found.get(level) or {}).get("reliability")
        if bins and sum(bins["count"]):
            ece = found[level].get("ece")
            said = f"<strong>{escape(level)}</strong>" + (f", ECE {markup.number(ece, '.4f')}" if ece is not None else "")
            figures += _drawn(plots.reliability(bins, i), f"reliability{i}", said, f"Reliability diagram of {level}")
    if not figures:
        return ""
    return markup.section(
        "Can its confidence be trusted?",
        "Accuracy of the decoded answers, by the probability that they were given. On the dashed diagonal, probability and "
        "accuracy agree; above it the model is too modest, below it too sure. The lower bars are the share of answers per bin.",
        f'<div class="plots small">{figures}</div>',
    )


def _decoders(summary: Mapping, levels: Sequence[str]) -> str:
    test = summary.get("test") or {}
    decoders, answer = test.get("decoders") or {}, test.get("decoder", "combined")
    if not decoders:
        return ""
    shown = [l for l in levels if any(l in v.get("accuracy", {}) for v in decoders.values())]
    rows = [
        (
            DECODERS.get(name, name.replace("_", " ")) + (" (the answer)" if name == answer else ""),
            *(markup.share(v.get("accuracy", {}).get(l)) for l in shown),
            markup.share(v.get("full_path_accuracy")),
        )
        for name, v in decoders.items()
    ]
    return markup.section(
        "Decoders",
        "Ways to make one path of what the heads say, by their test accuracy.",
        markup.table(("decoder", *shown, "full path"), rows),
    )


def _costs(summary: Mapping, levels: Sequence[str]) -> str:
    points = summary.get("points") or []
    if not points:
        return ""
    sizes = sorted({int(s) for p in points for s in p.get("latency_ms") or {}})
    shown = [l for l in levels if any(l in (p.get("accuracy") or {}) for p in points)]
    # A point that is named as its only granularity, and the one of all of them, need no further word.
    several = any(p.get("granularities") and p["granularities"] != [p.get("name")] for p in points if p.get("name") != "all")
    head = ["operating point", *(["granularities"] if several else []), "parameters", "FLOPs"]
    head += [f"ms, batch {s}" for s in sizes] + shown
    rows = []
    for point in points:
        latency, accuracy = point.get("latency_ms") or {}, point.get("accuracy") or {}
        rows.append((
            point.get("name"),
            *([", ".join(point.get("granularities") or ())] if several else []),
            markup.number(point.get("params"), ","),
            plots.si(point["flops"]) if point.get("flops") is not None else markup.DASH,
            *(markup.number(latency.get(str(s)), "#.3g").rstrip(".") for s in sizes),
            *(markup.share(accuracy.get(l)) for l in shown),
        ))  # fmt: skip
    return markup.section(
        "What an answer costs",
        "Each granularity by itself, and all together: parameters that are used, FLOPs of the forward pass of one example, "
        "median time per batch on the hardware above, and test accuracy.",
        markup.table(head, rows, texts=2 if several else 1),
    )


def _stages(summary: Mapping, levels: Sequence[str]) -> str:
    stages = summary.get("stages") or []
    if not stages:
        return ""
    validated = lambda stage, level: ((stage.get("val") or {}).get("levels") or {}).get(level) or {}
    shown = [l for l in levels if any(validated(s, l) for s in stages)]
    trained = any(s.get("params") is not None for s in stages)
    head = ["stage", "steps", "time", "training FLOPs", *(["trained parameters"] if trained else []), *shown]
    rows = [
        (
            stage.get("name"),
            markup.number(stage.get("steps"), ","),
            clock(stage["seconds"]) if stage.get("seconds") is not None else markup.DASH,
            plots.si(stage["flops"]) if stage.get("flops") is not None else markup.DASH,
            *([markup.number(stage.get("params"), ",")] if trained else []),
            *(markup.share(validated(stage, l).get("accuracy")) for l in shown),
        )
        for stage in stages
    ]
    return markup.section(
        "What training cost",
        "Stage by stage, with the validation accuracy at its end, at the stage's own operating point.",
        markup.table(head, rows),
    )


def _config(summary: Mapping) -> str:
    parts = ""
    for name, key in (("Config", "config"), ("Versions", "versions")):
        values = summary.get(key)
        if values:
            rows = "".join(
                f'<tr><th scope="row"><code>{escape(k)}</code></th><td><code>{escape(markup.plain(v))}</code></td></tr>\n'
                for k, v in values.items()
            )
            table = f'<div class="scroll"><table><tbody>\n{rows}</tbody></table></div>'
            parts += f"<details><summary>{name}</summary>{table}</details>\n"
    return f"<section>\n<h2>How it was made</h2>\n{parts}</section>" if parts else ""


def image_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] RGB as a PNG in a data: URI, reduced to at most 256 pixels a side."""
    larger = max(image.shape[:2])
    if larger > LARGEST:
        height, width = (max(1, round(s * LARGEST / larger)) for s in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))
    assert done, "cv2 encodes every uint8 image"
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _levels(summary: Mapping, records: Iterable[Mapping]) -> list[str]:
    """Coarse to fine, from whatever names them."""
    named = list((summary.get("test") or {}).get("levels") or {})
    if not named:
        keys = dict.fromkeys(k for r in records for k in r if k.startswith("val/") and k.endswith("/accuracy"))
        named = [k.removeprefix("val/").removesuffix("/accuracy") for k in keys]
    return named


def _drawn(drawn, name: str, said: str, described: str | None = None) -> str:
    return f"<figure>{plots.inline(drawn, described or said, name)}<figcaption>{said}</figcaption></figure>\n"


def _swatch(style: Mapping, marker: int | None = None) -> str:
    """Line, where the style has one, and marker of a legend."""
    colour = next(f"var(--{k})" for k, v in plots.LIGHT.items() if v == style["color"])
    drawn = ""
    if line := style.get("linestyle"):
        dashes = "none" if line == "-" else " ".join(str(2 * d) for d in line[1])
        drawn = f'<path d="M1 6h28" style="stroke:{colour};stroke-width:2;stroke-dasharray:{dashes}"/>'
    if marker is not None:
        drawn += f'<path d="{SHAPES[marker]}" style="fill:{colour}"/>'
    return f'<svg viewBox="0 0 30 12" aria-hidden="true">{drawn}</svg>'


def _training(summary: Mapping) -> str:
    said = []
    if summary.get("steps") is not None:
        said.append(f"{summary['steps']:,} steps")
    if summary.get("seconds") is not None:
        said.append(f"{clock(summary['seconds'])} with validation and compilation")
    if summary.get("params") is not None:
        said.append(f"{summary['params']:,} parameters")
    if summary.get("train_flops") is not None:
        said.append(f"{plots.si(summary['train_flops'])}FLOP")
    return ", ".join(said)


def _hue(levels: Sequence[str], level: str) -> str:
    return plots.HUES[list(levels).index(level) % len(plots.HUES)]


def _seed(summary: Mapping) -> str | None:
    return f"seed {summary['seed']}" if summary.get("seed") is not None else None


def _figure(figures: Mapping, key: str) -> str:
    return markup.number(figures.get(key), ".4f") if key.endswith("ece") else markup.share(figures.get(key))
