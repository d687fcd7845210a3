"""Plots of a run and of several, by matplotlib's object interface: no pyplot, no state left behind.

Figures are drawn in the colours of `LIGHT`; `inline` makes SVG for a page out of them, in which colours are the page's
variables (`var(--ink)`), so that one drawing serves light and dark.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import pathlib
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.markup import clean
from mgjax.errors import InputError

LIGHT = {
    "ink": "#1d2125",
    "muted": "#626a73",
    "line": "#d5d9de",
    "band": "#f0f2f5",
    "paper": "#fffffe",  # of its own, since a plain white is too common to be replaced safely
    "hue0": "#2867b2",
    "hue1": "#c25a1d",
    "hue2": "#2f8558",
    "hue3": "#8a4fb5",
    "hue4": "#a8761b",
    "hue5": "#b8406f",
}
DARK = {
    "ink": "#e4e7ea",
    "muted": "#9aa3ad",
    "line": "#3a4047",
    "band": "#22262b",
    "paper": "#16191c",
    "hue0": "#74aeea",
    "hue1": "#f0965a",
    "hue2": "#6cc394",
    "hue3": "#c295e6",
    "hue4": "#dab45c",
    "hue5": "#ec86ad",
}
HUES = tuple(k for k in LIGHT if k.startswith("hue"))
MARKERS = ("o", "s", "^", "D", "v", "<", "P", "X", ">", "p")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mgjax",
    "font.size": 11,
    "text.parse_math": False,  # a label may hold dollars
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
MOST_POINTS = 300  # of a curve; longer ones are averaged in bins


def require() -> None:
    """Raises InputError with the command that mends it, where matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib, which is not installed: pip install 'mgjax[report]'") from None


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's defaults and our style, whatever the user's own settings; taken back at the end."""
    require()
    from matplotlib import style

    with style.context(["default", STYLE]), warnings.catch_warnings():
        # The browser has the glyphs which the font of the layout lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def figure(width: float, height: float):
    """A figure of that size in points, which are also the units of its SVG."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


def save(drawn, path: pathlib.Path) -> None:
    """Writes a figure in the format of the path's suffix: svg, png or pdf.

    Raises:
        InputError: another suffix, or a path that cannot be written to.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png", "pdf"):
        raise InputError(f"a plot is written as .svg, .png or .pdf, not as '{path.name}'")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    data = io.BytesIO()
    with drawing():
        drawn.savefig(data, format=kind, facecolor="white", dpi=180, metadata=metadata)
    try:
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise InputError(f"the plot '{path}' cannot be written: {error}") from None


def inline(drawn, described: str, name: str) -> str:
    """SVG to stand in an HTML page: no namespaces, no fonts, no background, colours as variables of the page.

    Args:
        drawn: a figure.
        described: what it shows, for those who do not see it.
        name: unique in the page; all ids begin with it.
    """
    data = io.BytesIO()
    with drawing():
        drawn.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(data.getvalue())
    bare = lambda tag: tag.rpartition("}")[2]
    variables = {colour: f"var(--{word})" for word, colour in LIGHT.items()}
    colours = re.compile("|".join(variables))
    for parent in list(root.iter()):
        for child in list(parent):
            if bare(child.tag) in ("metadata", "style"):
                parent.remove(child)
        parent.tag = bare(parent.tag)
        attributes = {bare(k): v for k, v in parent.attrib.items()}
        parent.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value[1:]}"
            elif key in ("clip-path", "style"):
                value = colours.sub(lambda m: variables[m[0]], value.replace("url(#", f"url(#{name}-"))
                value = re.sub(r"font: (?:[a-z]+ )*([\d.]+px) [^;]*", r"font-size: \1", value)
                value = re.sub(r"font-family: [^;]*; ?", "", value)
            parent.set(key, value)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": described}
    return ET.tostring(root, encoding="unicode")


def si(value: float, digits: int = 3) -> str:
    """A number with a decimal prefix, to that many significant digits.

    >>> si(1.2999e14), si(62_000_000), si(1500), si(0.25), si(0)
    ('130 T', '62.0 M', '1.50 k', '0.250 ', '0 ')
    """
    if not value:
        return "0 "
    size = min(max(math.floor(math.log10(abs(value)) / 3), 0), 8)
    if size < 8 and float(f"{abs(value) / 1000**size:.{digits}g}") >= 1000:
        size += 1
    return f"{value / 1000**size:#.{digits}g}".rstrip(".") + f" {('', *'kMGTPEZY')[size]}"


def tick(value: float, _: int | None = None) -> str:
    """As `si`, as short as it goes.

    >>> tick(1500), tick(20), tick(0)
    ('1.5k', '20', '0')
    """
    number, prefix = si(value).split(" ")
    return f"{float(number):g}{prefix}"


def short(text: str, most: int = 18) -> str:
    """A label that fits, without characters that cannot be shown."""
    text = clean(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def level_of(head: str, levels: Sequence[str]) -> str | None:
    """The level that a head answers, by its name: `LEVEL`, or `LEVEL_something`."""
    return max((l for l in levels if head == l or head.startswith(f"{l}_")), key=len, default=None)


def line_styles(heads: Sequence[str], levels: Sequence[str]) -> dict[str, dict]:
    """head → colour, of its level, and dashes, which tell apart the heads of one level."""
    result, seen = {}, {}
    for head in heads:
        group = level_of(head, levels) or head
        place = levels.index(group) if group in levels else len(levels) + len(set(seen) - set(levels))
        dashes = DASHES[(seen.get(group, 0) + place // len(HUES)) % len(DASHES)]
        result[head] = {"color": LIGHT[HUES[place % len(HUES)]], "linestyle": dashes}
        seen[group] = seen.get(group, 0) + 1
    return result


def spans(summary: Mapping, records: Sequence[Mapping]) -> list[tuple[str, float, float]]:
    """(name, first step, last step) of every stage: of the summary, or else of the records."""
    stages = summary.get("stages") or []
    if stages and all(s.get("steps") is not None for s in stages):
        ends = list(itertools.accumulate(s["steps"] for s in stages))
        return [(s["name"], end - s["steps"], end) for s, end in zip(stages, ends)]
    result = []
    for record in records:
        if "stage" in record:
            if result and result[-1][0] == record["stage"]:
                result[-1] = (*result[-1][:2], record["step"])
            else:
                result.append((record["stage"], result[-1][2] if result else 0, record["step"]))
    return result


def names_fit(stages: Sequence[tuple[str, float, float]], width: float = 330) -> bool:
    """Whether every stage is as wide as its name; else stages are numbered."""
    whole = max((end for *_, end in stages), default=0) or 1
    return all(len(name) * 7 + 6 <= (end - start) / whole * width for name, start, end in stages)


def curve(records: Sequence[Mapping], key: str, gaps: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one scalar, with a gap (NaN) wherever a stage ends; averaged in bins where there are very many."""
    steps, values = [], []
    points = [(r["step"], r[key], r.get("stage")) for r in records if isinstance(r.get(key), (int, float))]
    size = math.ceil(len(points) / MOST_POINTS)
    for _, group in itertools.groupby(points, key=lambda p: p[2]):
        group = np.array([p[:2] for p in group], float)
        for i in range(0, len(group), size):
            step, value = group[i : i + size].mean(0)
            steps.append(step)
            values.append(value)
        if gaps:
            steps.append(steps[-1])
            values.append(np.nan)
    return np.array(steps), np.array(values)


def _stages(axes, stages: Sequence[tuple[str, float, float]], labelled: bool) -> None:
    by_name = names_fit(stages)
    whole = max((end for *_, end in stages), default=0) or 1
    for i, (name, start, end) in enumerate(stages):
        if i % 2 == 0:
            axes.axvspan(start, end, color=LIGHT["band"], linewidth=0, zorder=0)
        if labelled and (by_name or (end - start) / whole > 0.03):
            shown = short(name) if by_name else str(i + 1)
            axes.text((start + end) / 2, 1.02, shown, transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=11)
    if stages:
        axes.set_xlim(0, whole)


def _steps_axis(axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.set_xlabel("step")


def _percent(axis) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    axis.set_major_locator(MultipleLocator(0.2))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))


def losses(records: Sequence[Mapping], stages: Sequence[tuple], styles: Mapping[str, dict]):
    """Loss per head over the steps, and the learning rate beneath; None where no loss was recorded."""
    keys = {h: f"loss/{h}" for h in styles if any(f"loss/{h}" in r for r in records)}
    if not keys and not any("loss" in r for r in records):
        return None
    rate = curve(records, "learning_rate", gaps=False)
    with drawing():
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        drawn = figure(400, 290)
        if len(rate[0]):
            axes, below = drawn.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            below.plot(*rate, color=LIGHT["muted"], linewidth=1.3)
            below.yaxis.set_major_locator(MaxNLocator(2))
            below.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            below.set_ylim(bottom=0)
            below.set_ylabel("rate")
            _stages(below, stages, labelled=False)
        else:
            below = axes = drawn.subplots()
        _stages(axes, stages, labelled=True)
        for head, key in keys.items():
            axes.plot(*curve(records, key), linewidth=1.3, **styles[head])
        if not keys:
            axes.plot(*curve(records, "loss"), linewidth=1.3, color=LIGHT["hue0"])
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("loss")
        drawn.align_ylabels()
        _steps_axis(below)
    return drawn


def accuracies(records: Sequence[Mapping], stages: Sequence[tuple], styles: Mapping[str, dict], levels: Sequence[str]):
    """Accuracy per head on training batches, and per level on validation; None where neither was recorded."""
    keys = {h: f"accuracy/{h}" for h in styles if any(f"accuracy/{h}" in r for r in records)}
    validated = {l: f"val/{l}/accuracy" for l in levels if any(f"val/{l}/accuracy" in r for r in records)}
    if not keys and not validated:
        return None
    with drawing():
        drawn = figure(400, 290)
        axes = drawn.subplots()
        _stages(axes, stages, labelled=True)
        for head, key in keys.items():
            axes.plot(*curve(records, key), linewidth=1.3, alpha=0.8, **styles[head])
        for i, level in enumerate(levels):
            if level not in validated:
                continue
            at = [(r["step"], r[validated[level]]) for r in records if isinstance(r.get(validated[level]), (int, float))]
            look = dict(color=LIGHT[HUES[i % len(HUES)]], marker=MARKERS[i % len(HUES)])
            axes.plot(
                *np.array(at, float).reshape(-1, 2).T,
                linestyle="none",
                markersize=7,
                clip_on=False,
                zorder=5,
                markeredgecolor=LIGHT["paper"],
                markeredgewidth=1.2,
                **look,
            )
        axes.set_ylim(0, 1)
        _percent(axes.yaxis)
        axes.set_ylabel("accuracy")
        _steps_axis(axes)
    return drawn


def contributions(records: Sequence[Mapping], stages: Sequence[tuple], styles: Mapping[str, dict], of: str):
    """What each part contributes over the steps, to the "loss" or the norm of the "gradient"; None where none was recorded."""
    keys = {part: f"part/{of}/{part}" for part in styles if any(f"part/{of}/{part}" in r for r in records)}
    if not keys:
        return None
    with drawing():
        drawn = figure(400, 250)
        axes = drawn.subplots()
        _stages(axes, stages, labelled=True)
        for part, key in keys.items():
            axes.plot(*curve(records, key), linewidth=1.3, marker=".", markersize=4, **styles[part])
        axes.set_yscale("log")
        axes.set_ylabel("loss" if of == "loss" else "norm of the gradient")
        _steps_axis(axes)
    return drawn


def raw_against_decoded(levels: Mapping[str, tuple[float | None, float | None]]):
    """level → (raw, decoded) accuracy: a row per level, a dot per answer."""
    with drawing():
        drawn = figure(400, 52 + 52 * len(levels))
        axes = drawn.subplots()
        for i, answers in enumerate(levels.values()):
            colour = LIGHT[HUES[i % len(HUES)]]
            known = [v for v in answers if v is not None]
            axes.plot(known, [i] * len(known), color=colour, linewidth=2, alpha=0.5)
            for value, fill, offset in zip(answers, (LIGHT["paper"], colour), (-17, 8)):  # raw below its dot, decoded above
                if value is not None:
                    look = dict(markerfacecolor=fill, markeredgecolor=colour, markeredgewidth=1.6, markersize=8)
                    axes.plot([value], [i], marker="o", linestyle="none", clip_on=False, zorder=5, **look)
                    axes.annotate(f"{value:.2%}", (value, i), (0, offset), textcoords="offset points", ha="center", size=10)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(levels) - 0.45, -0.55)
        axes.set_yticks(range(len(levels)), [short(l) for l in levels])
        axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
        axes.grid(False, axis="y")
        _percent(axes.xaxis)
    return drawn


def reliability(bins: Mapping[str, Sequence], hue: int = 0):
    """Accuracy by confidence in equal bins, against the diagonal, with the share of answers per bin beneath."""
    count = np.array(bins["count"], float)
    filled = count > 0
    accuracy = np.array([a if a is not None else np.nan for a in bins["accuracy"]], float)[filled]
    confidence = np.array([c if c is not None else np.nan for c in bins["confidence"]], float)[filled]
    width = 1 / len(count)
    left = np.arange(len(count))[filled] * width
    colour = LIGHT[HUES[hue % len(HUES)]]
    with drawing():
        drawn = figure(270, 300)
        axes, below = drawn.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.bar(left, accuracy, width, align="edge", color=colour, alpha=0.35, edgecolor=LIGHT["paper"], linewidth=0.8)
        axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 2)))
        axes.plot(confidence, accuracy, color=colour, linewidth=1.2, marker="o", markersize=3.5, clip_on=False, zorder=5)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _percent(axes.yaxis)
        axes.set_ylabel("accuracy")
        below.bar(
            left,
            count[filled] / max(count.sum(), 1),
            width,
            align="edge",
            color=LIGHT["muted"],
            alpha=0.5,
            edgecolor=LIGHT["paper"],
            linewidth=0.8,
        )
        below.set_ylim(bottom=0)
        below.set_yticks([])
        below.grid(False)
        below.set_ylabel("share")
        below.set_xlabel("confidence")
        _percent(below.xaxis)
        drawn.align_ylabels()
    return drawn


def trade_off(groups: Sequence[Mapping], levels: Sequence[str], costs: Mapping[str, str]):
    """Accuracy per level against each cost, a panel per cost.

    Args:
        groups: each with "name", and under "mean" and "std" the costs and "LEVEL/accuracy"; std may be None.
        levels: a colour each; groups have a marker each.
        costs: key in "mean" → label of the axis.
    """
    with drawing():
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        names = [g["name"] for g in groups]
        across = max(1, 110 // (max(map(len, names)) + 8))
        drawn = figure(350 * len(costs), 300 + 20 * (math.ceil(len(levels) / 4) + math.ceil(len(groups) / across)))
        for axes, (cost, label) in zip(drawn.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs.items()):
            for g, group in enumerate(groups):
                x = group["mean"].get(cost)
                for i, level in enumerate(levels):
                    y = group["mean"].get(f"{level}/accuracy")
                    if x and y is not None:
                        spread = (group["std"] or {}).get(f"{level}/accuracy")
                        axes.errorbar(
                            x,
                            y,
                            spread,
                            color=LIGHT[HUES[i % len(HUES)]],
                            marker=MARKERS[g % len(MARKERS)],
                            markersize=7,
                            alpha=0.85,
                            capsize=3,
                            linewidth=1.2,
                        )
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            if high / low < 10:  # room for two labelled ticks
                middle = math.sqrt(low * high)
                axes.set_xlim(middle / 3.3, middle * 3.3)
            axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(tick))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
            axes.margins(y=0.08)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))
        drawn.axes[0].set_ylabel("test accuracy")
        colours = [
            Line2D([], [], color=LIGHT[HUES[i % len(HUES)]], linewidth=3, label=short(l, 30)) for i, l in enumerate(levels)
        ]
        markers = [
            Line2D([], [], color=LIGHT["ink"], marker=MARKERS[g % len(MARKERS)], linestyle="none", label=short(name, 80))
            for g, name in enumerate(names)
        ]
        drawn.legend(handles=colours, loc="outside upper center", ncols=min(4, len(levels)), frameon=False)
        drawn.legend(handles=markers, loc="outside lower left", ncols=across, frameon=False)
    return drawn


def ablation(groups: Sequence[Mapping], levels: Sequence[str], baseline: str):
    """A row per group: accuracy of every level, a panel each, of single seeds and mean ± standard deviation; training FLOPs.

    Args:
        groups: each with "name", "runs" that have `figures`, and under "mean" and "std" the figures; std may be None.
        levels: a panel and a colour each.
        baseline: name of the group whose means are drawn through all rows.
    """
    with drawing():
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        names = [short(g["name"], 30) + (" (baseline)" if g["name"] == baseline and len(groups) > 1 else "") for g in groups]
        keys = [f"{l}/accuracy" for l in levels]
        drawn = figure(90 + 6 * max(map(len, names)) + 230 * len(levels) + 110, 66 + 34 * len(groups))
        drawn.get_layout_engine().set(wspace=0.04)
        panels = drawn.subplots(1, len(levels) + 1, sharey=True, width_ratios=[2.3] * len(levels) + [1.1])
        for i, (axes, level, key) in enumerate(zip(panels, levels, keys)):
            colour = LIGHT[HUES[i % len(HUES)]]
            for row, g in enumerate(groups):
                single = [r.figures[key] for r in g["runs"] if key in r.figures]
                if not single:
                    continue
                # Seeds lie beneath their mean, each at a height of its own, the same in every row.
                heights = row + 0.22 + 0.05 * (np.arange(len(single)) - (len(single) - 1) / 2) / max(1, len(single) / 4)
                axes.scatter(single, heights, s=14, color=colour, alpha=0.55, linewidths=0, zorder=3)
                if key not in g["mean"]:
                    continue
                mean, spread = g["mean"][key], (g["std"] or {}).get(key)
                look = dict(marker="o", markersize=6.5, markeredgecolor=LIGHT["paper"], markeredgewidth=1.0)
                axes.errorbar(mean, row - 0.08, xerr=spread, color=colour, capsize=3, linewidth=1.6, zorder=4, **look)
                if g["name"] == baseline and len(groups) > 1:
                    axes.axvline(mean, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 2)), zorder=1)
            axes.set_title(short(level, 30), size=11, color=colour, loc="left")
            axes.set_xlabel("test accuracy: seeds, mean ± std")
            axes.margins(x=0.08)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), prune="upper"))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))
        cost = panels[-1]
        flops = [g["mean"].get("train_flops") for g in groups]
        most = max((f for f in flops if f), default=1)
        for row, value in enumerate(flops):
            if value:
                cost.barh(row, value, 0.42, color=LIGHT["muted"], alpha=0.45, linewidth=0)
                cost.annotate(si(value).strip(), (value, row), (4, 0), textcoords="offset points", va="center", size=10)
        cost.set_title("training FLOPs", size=11, loc="left")
        cost.set_xlim(0, 1.5 * most)
        cost.set_xticks([])
        cost.spines["bottom"].set_visible(False)
        for axes in panels:
            axes.grid(False, axis="y")
            axes.spines["left"].set_visible(False)
            for row in range(0, len(groups), 2):
                axes.axhspan(row - 0.5, row + 0.5, color=LIGHT["band"], linewidth=0, zorder=0)
        panels[0].set_ylim(len(groups) - 0.5, -0.5)
        panels[0].set_yticks(range(len(groups)), names)
        panels[0].tick_params(axis="y", labelcolor=LIGHT["ink"])
    return drawn
