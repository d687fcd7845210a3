"""What a trained model says of new examples: `python -m experiments.NAME --workdir=W --predict=EXAMPLE`.

Of a text its words, of an image its file, of a row COLUMN=VALUE,COLUMN=VALUE, of a rating user=ID,item=ID. Further arguments
are examples too, so that `--predict *.jpg` works. In batches: `--predict_from=FILE.csv` (or `.jsonl`), a row per example, with
a column `text`, `path` or the table's own; `--output=FILE.csv` (or `.jsonl`) writes the answers, whole or not at all.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mgjax.config import override
from mgjax.contracts import Outputs
from mgjax.data.table_source import read_csv
from mgjax.decode import decode, task_log_probs
from mgjax.errors import InputError
from mgjax.taxonomy import Taxonomy, read_taxonomy
from mgjax.train import load_variables

ROWS = 256  # of a batch
PRESENT = "present/"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A trained run's model, and how it sees new examples.

    Attributes:
        model, taxonomy: of the run.
        encode: rows → `Batch.inputs`, ready for the model, and, as `present/GRANULARITY`, bool [B] of granularities that not
            all examples have.
        labels: task → names of its labels, of which an example has any number.
    """

    model: nn.Module
    taxonomy: Taxonomy | None
    encode: Callable[[Sequence[Mapping]], Mapping[str, np.ndarray]]
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def answer(
    base: Any,
    see: Callable,
    column: str,
    workdir: pathlib.Path,
    examples: Sequence[str],
    source: str,
    output: str,
    name: str = "",
) -> list[dict]:
    """Answers examples of the command line, or of a file, and shows or writes what is said.

    Args:
        base: config with defaults.
        see: (config, what the run recorded of its dataset, its taxonomy) → Seen.
        column: of a row, that a single example of the command line fills; empty: it names columns itself.
        workdir: of a run that is finished.
        examples, source, output: as on the command line.
        name: of the experiment, of which the workdir is to be.

    Returns:
        A dict per example: its row, and by level or task what is said, with its probability.

    Raises:
        InputError: no trained model, or one of another experiment, an unreadable file, a row that does not fit, a column on the
            command line that the model does not see.
    """
    rows = [{column: e} if column else _pairs(e) for e in examples] + (_read(pathlib.Path(source)) if source else [])
    if not rows:
        raise InputError("nothing to predict: --predict=EXAMPLE, or --predict_from=FILE")
    if output and pathlib.Path(output).suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output={output}: answers are written as .csv or .jsonl")
    if column and (lacking := [i for i, row in enumerate(rows) if not isinstance(row.get(column), str)]):
        raise InputError(f"row {lacking[0] + 1} of what is to be predicted has no '{column}'")
    try:
        made = json.loads((workdir / "config.json").read_text())
        record = json.loads((workdir / "dataset.json").read_text())
    except OSError as error:
        raise InputError(f"'{workdir}' is not the workdir of a trained model: '{error.filename}' cannot be read") from None
    if name and made["experiment"] != name:
        raise InputError(f"'{workdir}' is of {made['experiment']}: ask python -m experiments.{made['experiment']}")
    for row in rows[: len(examples)] if "columns" in record else ():
        if unknown := [c for c in row if c not in record["columns"]]:
            near = difflib.get_close_matches(unknown[0], record["columns"], 1)
            hint = f"the nearest is '{near[0]}'" if near else f"there are {', '.join(record['columns'])}"
            raise InputError(f"the model sees no column '{unknown[0]}'; {hint}")
    config = made["config"]
    config = override(base, {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    tree = read_taxonomy(workdir / "taxonomy.json") if (workdir / "taxonomy.json").exists() else None
    seen, variables, said = see(config, record, tree), load_variables(workdir), []
    apply = jax.jit(lambda v, x, p: seen.model.apply(v, x, seen.model.everything, present=p, train=False))
    for start in range(0, len(rows), ROWS):
        made = seen.encode(rows[start : start + ROWS])
        present = {k.removeprefix(PRESENT): v for k, v in made.items() if k.startswith(PRESENT)}
        outputs = apply(variables, {k: v for k, v in made.items() if not k.startswith(PRESENT)}, present)
        said += _say(seen, config.decoder, outputs, len(rows[start : start + ROWS]))
    result = [dict(row) | own for row, own in zip(rows, said)]
    if output:
        _write(pathlib.Path(output), result)
        print(f"{len(result)} answers: {output}")
    else:
        for row, own in zip(rows, said):
            print(f"{row[column] if column else ', '.join(f'{k}={v}' for k, v in row.items())}: {_line(own)}")
    return result


def _say(seen: Seen, decoder: str, outputs: Outputs, count: int) -> list[dict]:
    """By example: level → name and level_probability; task → its number, or its labels."""
    model = seen.model
    rows: list[dict] = [{} for _ in range(count)]
    said = task_log_probs(outputs, model.heads, [t for t in model.tasks if t.kind == "classification"])
    if said:
        raw = {t.level: said[t.name] for t in model.tasks if t.name in said}
        path = jax.device_get(decode(raw, seen.taxonomy, decoder))
        for level in (l for l in seen.taxonomy.levels if l in path.labels):
            names = seen.taxonomy.names[seen.taxonomy.index(level)]
            for i, row in enumerate(rows):
                label = path.labels[level][i]
                row |= {level: names[label], f"{level}_probability": round(float(np.exp(path.log_probs[level][i, label])), 6)}
    for task in (t for t in model.tasks if t.kind != "classification"):
        each = [np.asarray(outputs.logits[h.name], np.float64) for h in model.heads if h.task == task.name]
        if task.kind == "multilabel":
            share = np.mean([1 / (1 + np.exp(-z)) for z in each], 0)
            for row, own in zip(rows, share):
                row[task.name] = {n: round(float(p), 6) for n, p in zip(seen.labels[task.name], own) if p >= 0.5}
        else:
            for row, own in zip(rows, np.mean(each, 0)):
                row[task.name] = float(own[0]) if task.classes == 1 else own.tolist()
    return rows


def _line(said: Mapping) -> str:
    levels = [k for k in said if f"{k}_probability" in said]
    parts = [" › ".join(f"{said[l]} {said[f'{l}_probability']:.1%}" for l in levels)] if levels else []
    for name, value in said.items():
        if name not in levels and not name.endswith("_probability"):
            shown = ", ".join(f"{k} {p:.1%}" for k, p in value.items()) or "none" if isinstance(value, dict) else value
            parts.append(f"{name} {shown:.4g}" if isinstance(shown, float) else f"{name}: {shown}")
    return "; ".join(parts)


def _pairs(example: str) -> dict[str, str]:
    cells = [part.partition("=") for part in example.split(",")]
    if wrong := [name for name, equals, _ in cells if not equals]:
        raise InputError(f"--predict={example}: '{wrong[0]}' is no COLUMN=VALUE")
    return {name.strip(): value for name, _, value in cells}


def _read(path: pathlib.Path) -> list[dict]:
    if path.suffix == ".csv":
        return [row for _, row in read_csv(path, f"--predict_from={path}")[1]]
    if path.suffix != ".jsonl":
        raise InputError(f"--predict_from={path}: examples are read from .csv or .jsonl")
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"--predict_from={path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"--predict_from={path} line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"--predict_from={path} line {number}: an object is needed")
            rows.append(row)
    return rows


def _write(path: pathlib.Path, rows: Sequence[Mapping]) -> None:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        flat = lambda v: ";".join(v) if isinstance(v, dict) else v
        writer.writerows({k: flat(v) for k, v in row.items()} for row in rows)
        text = file.getvalue()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--output={path} cannot be written: {error.strerror}") from None
