"""Groups of runs against a baseline: paired tests over common seeds, and the table that shows them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from experiments import compare
from mgjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired comparison: mean and sample standard deviation of n differences, t and two-sided p; or why there are none."""

    n: int
    mean: float | None = None
    std: float | None = None
    t: float | None = None
    p: float | None = None
    why: str = ""


def paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """A paired t-test over the seeds that both have.

    d_s = ours_s − base_s,  t = mean(d) / (std(d) / √n),  with n − 1 degrees of freedom (Student 1908)

    Args:
        ours, base: seed → figure.

    Returns:
        The difference; without t and p, and with the reason, for fewer than two seeds, or where all d are alike to
        rounding: no spread, no test.

    Example:
        >>> round(paired({0: 0.52, 1: 0.53, 2: 0.56}, {0: 0.50, 1: 0.52, 2: 0.52, 3: 0.9}).p, 4)
        0.1181
        >>> paired({0: 0.52}, {0: 0.50}).why
        'one common seed'
    """
    seeds = sorted(set(ours) & set(base))
    if not seeds:
        return Difference(0, why="no common seed")
    a, b = [ours[s] for s in seeds], [base[s] for s in seeds]
    d = [x - y for x, y in zip(a, b)]
    mean = statistics.fmean(d)
    if len(d) < 2:
        return Difference(1, mean, why="one common seed")
    std = statistics.stdev(d)
    if std <= 1e-12 * max(map(abs, a + b)):
        return Difference(len(d), mean, std, why="no spread")
    test = stats.ttest_rel(a, b)
    return Difference(len(d), mean, std, float(test.statistic), float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): in ascending order, p'₍ᵢ₎ = max over j ≤ i of min(1, (m − j + 1) p₍ⱼ₎).

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def groups_of(runs: Mapping[str, Sequence[compare.Run]], baseline: str) -> tuple[list[dict], list[str]]:
    """One group per variant, in their order, and the levels, coarse to fine.

    Groups are those of `compare.group`, with "differences" from the baseline by figure, each a `Difference` as a dict with its
    "p_holm", adjusted over the variants.

    Args:
        runs: variant → its finished runs.

    Raises:
        InputError: runs that cannot be compared.
    """
    everything = [run for members in runs.values() for run in members]
    if not everything:
        return [], []
    compare.check_comparable(everything)
    groups = []
    for variant, members in runs.items():
        found = compare.group(members)
        if len(found) > 1:
            named = " | ".join(g["name"] for g in found)
            raise InputError(
                f"runs of '{variant}' differ in more than their seed ({named}): were they made on unlike machines?"
            )
        groups.append(found[0] | {"name": variant, "differences": {}})
    levels = compare.levels_of(everything)
    base = next((g for g in groups if g["name"] == baseline), None)
    others = [g for g in groups if base and g is not base]
    by_seed = lambda g, key: {r.seed: r.figures[key] for r in g["runs"] if key in r.figures}
    for key in [c.key for c in columns(groups, levels) if _tested(c)]:
        answer = [g for g in others if key in g["mean"] and key in base["mean"]]  # a model of superclasses names no class
        found = [paired(by_seed(g, key), by_seed(base, key)) for g in answer]
        adjusted = iter(holm([d.p for d in found if d.p is not None]))
        for g, d in zip(answer, found):
            g["differences"][key] = dataclasses.asdict(d) | {"p_holm": None if d.p is None else next(adjusted)}
    return groups, levels


def columns(groups: Sequence[Mapping], levels: Sequence[str]) -> list[compare.Column]:
    """The figures of the table: costs, accuracy per level, of the finest on validation too, full path, how far mistakes are."""
    wanted = {"train_flops", "seconds", "full_path_accuracy", "mistake_severity", *(f"{l}/accuracy" for l in levels)}
    wanted |= {f"{levels[-1]}/validation"} if levels else set()
    return [c for c in compare.columns(groups, levels) if c.key in wanted]


def show(title: str, groups: Sequence[Mapping], levels: Sequence[str], baseline: str, said: Sequence[str]) -> None:
    """Prints the table and the notes."""
    shown, main = columns(groups, levels), f"{levels[-1]}/accuracy" if levels else ""
    compared, several = any(g["differences"] for g in groups), adjusted_tests(groups, levels)
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("preset", overflow="fold", min_width=12, max_width=36)
    table.add_column("seeds", justify="right")
    for c in shown:
        table.add_column(escape(c.title), justify="right", no_wrap=True)
    if several:
        table.add_column(escape(f"p Holm, {levels[-1]}"), justify="right", no_wrap=True)
    for g in groups:
        cells = []
        for c in shown:
            text = c.show(g["mean"][c.key], g["std"] and g["std"][c.key]) if c.key in g["mean"] else compare.DASH
            difference = g["differences"].get(c.key)
            cells.append("\n".join([text, *_beneath(c, difference)] if difference else [text]))
        if several:
            adjusted = g["differences"].get(main, {}).get("p_holm")
            cells.append(compare.DASH if adjusted is None else _p(adjusted))
        name = f"{g['name']}\n(baseline)" if g["name"] == baseline and compared else g["name"]
        table.add_row(escape(name), str(g["n"]), *map(escape, cells))
        if compared:
            table.add_section()
    console = Console(highlight=False, emoji=False)
    # Figures are never cut: a file has room, and a terminal folds the lines.
    whole = console.measure(table, options=console.options.update(width=1000)).maximum
    console = Console(highlight=False, emoji=False, width=max(console.width, whole) if console.is_terminal else whole)
    if groups:
        console.print(table)
    for note in said:
        console.print(note, markup=False, soft_wrap=True)


def adjusted_tests(groups: Sequence[Mapping], levels: Sequence[str]) -> int:
    """How many tests of the finest level there are, if several."""
    count = sum(g["differences"].get(f"{levels[-1]}/accuracy", {}).get("p") is not None for g in groups)
    return count if count > 1 else 0


def machines(groups: Sequence[Mapping]) -> list[str]:
    """The hardware of all runs, in words."""
    return sorted({str(r.summary["hardware"]) for g in groups for r in g["runs"] if r.summary.get("hardware")})


def _tested(column: compare.Column) -> bool:
    """Costs are what they are; the rest is tested."""
    return column.key not in ("train_flops", "seconds")


def _beneath(column: compare.Column, d: Mapping) -> list[str]:
    """The difference, and its p or why there is none."""
    if d["mean"] is None:
        return [d["why"]]
    scale, digits = (1, 3) if column.key == "mistake_severity" else (100, 2)
    spread = f" ± {scale * d['std']:.{digits}f}" if d["std"] is not None else ""
    return [f"{scale * d['mean']:+.{digits}f}{spread}", d["why"] if d["p"] is None else f"p {_p(d['p'])}"]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
