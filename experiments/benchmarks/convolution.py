"""What a convolution costs on this machine, by size of the map, and what halves a map cheapest.

    python -m experiments.benchmarks.convolution [--rounds=7] [--batch=128] [--json=FILE]

Each round times every case once, in turn, so that a drift of the machine touches all alike;
printed are medians and, for comparisons, ratios pair by pair with their range.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from mgjax.flops import count_flops
from mgjax.train.monitor import hardware

# side, channels in, channels out
DENSE = [(32, 16, 16), (32, 32, 32), (16, 64, 64), (8, 128, 128), (4, 256, 256), (2, 256, 256)]


def convolve(x, kernel, stride: int = 1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def cases(batch: int) -> dict:
    """name → (function of (x, kernel), x, kernel)."""
    array = lambda *shape: jnp.ones(shape, jnp.float32)
    result = {f"dense {s}×{s} {i}→{o}": (convolve, array(batch, s, s, i), array(3, 3, i, o)) for s, i, o in DENSE}
    x, kernel = array(batch, 32, 32, 32), array(3, 3, 32, 64)
    result["halve 32×32 32→64 by stride"] = (lambda x, k: convolve(x, k, 2), x, kernel)
    result["halve 32×32 32→64 by pooling"] = (lambda x, k: convolve(nn.avg_pool(x, (2, 2), (2, 2)), k), x, kernel)
    return result


def measure(batch: int, rounds: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """name → seconds [rounds] and name → FLOPs, of the forward pass and both gradients."""
    compiled, flops = {}, {}
    for name, (fn, x, kernel) in cases(batch).items():
        both = jax.value_and_grad(lambda x, k, fn=fn: jnp.sum(fn(x, k) ** 2), argnums=(0, 1))
        compiled[name] = jax.jit(both).lower(x, kernel).compile(), x, kernel
        flops[name] = count_flops(both, x, kernel).total
    seconds = {name: [] for name in compiled}
    for i in range(rounds + 1):
        for name, (run, x, kernel) in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(x, kernel))
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(s) for name, s in seconds.items()}, flops


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    seconds, flops = measure(options.batch, options.rounds)
    print(f"jax {jax.__version__}, {hardware()}; batch {options.batch}, float32, forward and both gradients")
    figures, table, console = {}, Table(), Console(highlight=False)
    for column in ("case", "ms", "range", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, s in seconds.items():
        rate = flops[name] / np.median(s) / 1e9
        table.add_row(name, f"{np.median(s) * 1e3:.1f}", f"{s.min() * 1e3:.1f}–{s.max() * 1e3:.1f}", f"{rate:.0f}")
        figures |= {f"{name} ms": round(float(np.median(s)) * 1e3, 3), f"{name} GFLOP/s": round(float(rate), 1)}
    console.print(table)
    slow, fast = "halve 32×32 32→64 by stride", "halve 32×32 32→64 by pooling"
    ratio = seconds[slow] / seconds[fast]
    console.print(f"{slow} / {fast}: {np.median(ratio):.1f}× ({ratio.min():.1f}–{ratio.max():.1f})")
    spread = {"": np.median(ratio), " smallest": ratio.min(), " largest": ratio.max()}
    figures |= {f"{slow} / {fast}{which}": round(float(r), 2) for which, r in spread.items()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
