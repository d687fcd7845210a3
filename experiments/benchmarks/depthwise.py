"""Depthwise convolution: `mgjax.ops.depthwise_conv` against lax, Flax and PyTorch, alone and in a training step.

    python -m experiments.benchmarks.depthwise [--rounds=9] [--only=ops|step] [--no_lax] [--dtype=bfloat16] [--json=FILE]
    python -m experiments.benchmarks.depthwise --only=ops --shapes=32x32x32x64k3,8x112x112x32k3s2,64x256x128k7

*The operation*, forward alone, and forward with both gradients for a given cotangent: "auto" as `depthwise_conv` chooses
it; `lax.conv_general_dilated` with feature_group_count=C, and no code of ours (with "pallas" beside it on a GPU); and
PyTorch's conv2d in channels_last, as wide as the map is or of width 1, with as many threads as there are cores, where
`pip install 'mgjax[bench]'` has put it. *The step*: forward, cross entropy, backward and SGD with momentum of the
CIFAR-sized MobileNetV2, against the same network and parameters with Flax's `nn.Conv(feature_group_count=C)` in place of
each depthwise layer. Before anything is timed, all must agree with lax; if not, the benchmark stops.

Each round takes every case once: one call to warm up, then as many as fill 10 ms, at least 3 (1 of lax, which is slow).
PyTorch's threads go on spinning for a while after a call, at the cost of whoever comes next; hence the call that
warms up, and hence the order rotates by one case each round and is turned round in every other one, so that nobody
always runs behind the same neighbour. Printed are medians, and ratios round by round, with quartiles. "Of a copy" is the
rate at which the bytes move that must (each of the three operations reads two of x, y and kernel and writes the third)
over that of `x + 1` for 64 MiB, written into memory that is there already, from the same rounds. Maps that fit into a
cache can exceed 1; results, which come in fresh memory, cost a CPU page faults that the copy has not.
"""

from __future__ import annotations

import os

# JAX and PyTorch share one GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import contextlib
import datetime
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from mgjax.branches import NAMED_BRANCHES
from mgjax.branches.base import Branch
from mgjax.layers import DepthwiseConv
from mgjax.layers.conv import pads
from mgjax.ops import depthwise_conv
from mgjax.train.monitor import hardware

try:
    import torch
except ImportError:
    torch = None

SEED = 0
SHAPES = "32x32x32x64k3,32x16x16x128k3,32x56x56x64k3,32x14x14x384k7,8x112x112x32k3,8x112x112x32k3s2,64x256x128k3,64x256x128k7"
PASSES = ("forward", "forward+backward")
BLOCK, COPIED = 0.01, 64 << 20  # seconds that the calls of a case fill in a round; bytes of the array that is copied
# Largest difference, over the largest number of an array; GPUs round to TF32.
TOLERANCE = {("float32", True): 1e-4, ("float32", False): 5e-3, ("bfloat16", True): 3e-2, ("bfloat16", False): 3e-2}


class Shape(NamedTuple):
    """Of one convolution: x [batch, *size, channels], an odd kernel and as many zeros on both sides.

    Attributes:
        dims: of x.
        kernel: side of the kernel.
        stride: of its windows.
    """

    dims: tuple[int, ...]
    kernel: int
    stride: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of "32x56x56x64k3", "8x112x112x32k3s2" or "64x256x128k7"."""
        found = re.fullmatch(r"(\d+(?:x\d+){2,3})k(\d+)(?:s(\d+))?", text.strip())
        shape = found and cls(tuple(map(int, found[1].split("x"))), int(found[2]), int(found[3] or 1))
        if not shape or not min(*shape.dims, shape.stride) or shape.kernel % 2 == 0:
            raise SystemExit(f"error: '{text}' is no shape as 8x112x112x32k3s2 or 64x256x128k7 are, with an odd kernel")
        return shape

    def __str__(self) -> str:
        return "×".join(map(str, self.dims)) + f" k{self.kernel}" + (f" s{self.stride}" if self.stride > 1 else "")

    @property
    def axes(self) -> int:
        return len(self.dims) - 2

    @property
    def arrays(self) -> tuple[tuple[int, ...], ...]:
        """Of x, kernel and y."""
        batch, *size, channels = self.dims
        return self.dims, (*(self.kernel,) * self.axes, 1, channels), (batch, *(-(-n // self.stride) for n in size), channels)


class Case(NamedTuple):
    """Something to time: `call` begins it, and `wait` ends it, given what it returned."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    least: int = 3  # calls in a round


# ----------------------------------------------------------------------- the operation


def lax_conv(x, kernel, shape: Shape):
    """What there would be without `depthwise_conv`."""
    layout = ("NHWC", "HWIO", "NHWC") if shape.axes == 2 else ("NWC", "WIO", "NWC")
    padding = ((shape.kernel // 2,) * 2,) * shape.axes
    strides = (shape.stride,) * shape.axes
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, feature_group_count=shape.dims[-1]
    )


def our_conv(x, kernel, shape: Shape, impl: str):
    return depthwise_conv(x, kernel, strides=shape.stride, padding=shape.kernel // 2, impl=impl)


def in_jax(fn: Callable, arrays, which: str, least: int = 3) -> Case:
    """One pass of a function of (x, kernel); arrays are x, kernel and the cotangent of y."""

    def both(x, kernel, g):
        y, back = jax.vjp(fn, x, kernel)
        return y, *back(g)

    run = jax.jit((lambda x, kernel, _: (fn(x, kernel),)) if which == "forward" else both)
    return Case(lambda: run(*arrays), jax.block_until_ready, least)


def in_torch(shape: Shape, arrays, which: str, dtype: str, device: str) -> Case:
    """The same of PyTorch, eagerly; one dimension is a map of width 1."""
    x, kernel, g = (torch.from_numpy(a if shape.axes == 2 else np.expand_dims(a, a.ndim - 1)) for a in arrays)
    place = lambda t, *order: t.permute(order).to(device, getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    x, kernel, g = place(x, 0, 3, 1, 2), place(kernel, 3, 2, 0, 1), place(g, 0, 3, 1, 2)
    two = lambda n, fill: (n, n) if shape.axes == 2 else (n, fill)
    how = dict(stride=two(shape.stride, 1), padding=two(shape.kernel // 2, 0), groups=shape.dims[-1])

    @torch.no_grad()
    def forward():
        return (torch.nn.functional.conv2d(x, kernel, **how),)

    def both():
        y = torch.nn.functional.conv2d(x, kernel, **how)
        return y, *torch.autograd.grad(y, (x, kernel), g)

    if which != "forward":
        x.requires_grad_(), kernel.requires_grad_()
    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    return Case(forward if which == "forward" else both, wait)


def from_torch(results, shape: Shape) -> list[np.ndarray]:
    """y and maybe both gradients as ours are laid out."""
    orders = ((0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0))
    found = [t.detach().float().cpu().permute(order).numpy() for t, order in zip(results, orders)]
    return found if shape.axes == 2 else [a.squeeze(a.ndim - 2) for a in found]


def agree(what: str, found, expected, tolerance: float) -> None:
    """Stops where an array is off by more than the tolerance, over the largest number of the array expected."""
    names = ("result", "gradient of x", "gradient of the kernel")[: len(expected)]
    for name, a, b in zip(names, found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        apart = float(np.abs(a - b).max() / np.abs(b).max()) if a.shape == b.shape else math.nan
        if not apart <= tolerance:
            raise SystemExit(f"error: {what}: the {name} differs from that of lax by {apart:.1e} (allowed: {tolerance:.0e})")


def op_cases(shapes: list[Shape], dtype: str, lax: bool) -> dict[tuple[Shape, str, str], Case]:
    """(shape, pass, who) → case, compiled, and checked against lax."""
    rng, cases, cpu = np.random.default_rng(SEED), {}, jax.default_backend() == "cpu"
    device = "cpu" if cpu else "cuda"
    use_torch = torch is not None and (cpu or torch.cuda.is_available())
    if use_torch:
        torch.set_num_threads(os.cpu_count())
        torch.backends.cudnn.benchmark = True
    for shape in shapes:
        arrays = [rng.normal(size=s).astype(np.float32) for s in shape.arrays]
        ours = [jnp.asarray(a, dtype) for a in arrays]
        for which in PASSES:
            reference = in_jax(functools.partial(lax_conv, shape=shape), ours, which, least=1)
            expected = reference.call()
            found = {
                impl: in_jax(functools.partial(our_conv, shape=shape, impl=impl), ours, which)
                for impl in (("auto", "pallas") if jax.default_backend() == "gpu" else ("auto",))
            }
            results = {who: case.call() for who, case in found.items()}
            if lax:
                found["lax"] = reference
            if use_torch:
                found["torch"] = in_torch(shape, arrays, which, dtype, device)
                results["torch"] = from_torch(found["torch"].call(), shape)
            for who, result in results.items():
                agree(f"{shape} {which}, {who}", result, expected, TOLERANCE[dtype, cpu])
            cases |= {(shape, which, who): case for who, case in found.items()}
    return cases


def measure(cases: dict[Any, Case], rounds: int) -> dict[Any, np.ndarray]:
    """Name → seconds of a call [rounds]."""
    each = jax.default_backend() == "cpu"  # a GPU's calls are queued, so that it never waits for the host
    calls, seconds, names = {}, {name: [] for name in cases}, list(cases)
    for name, case in cases.items():
        case.wait(case.call())
        began = time.perf_counter()
        case.wait(case.call())
        calls[name] = max(case.least, math.ceil(BLOCK / (time.perf_counter() - began)))
    for i in range(rounds):
        first = i % len(names)
        for name in [*names[first:], *names[:first]][:: -1 if i % 2 else 1]:
            case = cases[name]
            case.wait(case.call())
            began = time.perf_counter()
            for _ in range(calls[name]):
                result = case.call()
                if each:
                    case.wait(result)
            case.wait(result)
            seconds[name].append((time.perf_counter() - began) / calls[name])
    return {name: np.array(s) for name, s in seconds.items()}


def copy_case() -> Case:
    """`x + 1` into a buffer that is used again and again."""
    x, buffer = jnp.ones(COPIED // 4, jnp.float32), jnp.ones(COPIED // 4, jnp.float32)
    add = jax.jit(lambda x, _: x + 1, donate_argnums=1, keep_unused=True)

    def call():
        nonlocal buffer
        buffer = add(x, buffer)
        return buffer

    return Case(call, jax.block_until_ready)


def compare_ops(shapes: list[Shape], dtype: str, rounds: int, lax: bool, say: Callable) -> dict[str, float]:
    """Measures all shapes and prints a table of them; name → figure."""
    cases = op_cases(shapes, dtype, lax)
    seconds = measure({"copy": copy_case(), **cases}, rounds)
    copied = 2 * COPIED / seconds["copy"]  # bytes a second
    figures, table = spread("copy GB/s", copied / 1e9, 2), Table()
    others = [who for who in ("pallas", "lax", "torch") if (shapes[0], "forward", who) in cases]
    ratios: dict[tuple[str, str], list[np.ndarray]] = {}
    titles = [f"{who} ms" for who in ("auto", *others)] + [_over(who) for who in others] + ["of a copy"]
    for title in ("shape", "pass", *titles):
        table.add_column(title, justify="left" if title in ("shape", "pass") else "right")
    for shape in shapes:
        for which in PASSES:
            case, of = f"{shape} {which}", {who: seconds[shape, which, who] for who in ("auto", *others)}
            row = []
            for who, s in of.items():
                figures |= spread(f"{case} {who} ms", s * 1e3, 4)
                row.append(short(np.median(s) * 1e3))
            for who in others:
                ratio = of["auto"] / of["torch"] if who == "torch" else of[who] / of["auto"]
                ratios.setdefault((which, _over(who)), []).append(ratio)
                figures |= spread(f"{case} {_over(who)}", ratio, 3)
                row.append(said(figures, f"{case} {_over(who)}"))
            moved = sum(map(math.prod, shape.arrays)) * jnp.dtype(dtype).itemsize * (1 if which == "forward" else 3)
            figures |= spread(f"{case} of a copy", moved / of["auto"] / copied, 3)
            table.add_row(str(shape), which, *row, f"{figures[f'{case} of a copy']:.2f}")
    say(table)
    say(f"a copy of {COPIED >> 20} MiB reads and writes {said(figures, 'copy GB/s')} GB/s")
    for (which, over), of in ratios.items():
        name = f"geometric mean, {which} {over}"
        figures |= spread(name, np.exp(np.log(of).mean(0)), 3)
        say(f"{name}: {said(figures, name)}")
    return figures


def _over(who: str) -> str:
    """How a ratio to "auto" is named; above 1 "auto" is faster, but than PyTorch where it is below."""
    return "auto / torch" if who == "torch" else f"{who} / auto"


# ----------------------------------------------------------------------- the step


def as_flax(call: Callable, args, kwargs, context):
    """Flax's own convolution wherever a `DepthwiseConv` is called, on that layer's parameters; see `nn.intercept_methods`."""
    layer = context.module
    if not isinstance(layer, DepthwiseConv) or context.method_name != "__call__":
        return call(*args, **kwargs)
    (x,) = args
    axes, channels = x.ndim - 2, x.shape[-1]
    conv = nn.Conv(
        channels * layer.multiplier,
        (layer.kernel,) * axes,
        layer.stride,
        padding=pads(layer.padding, layer.kernel, layer.dilation, axes),
        kernel_dilation=layer.dilation,
        feature_group_count=channels,
        use_bias=layer.use_bias,
        dtype=layer.dtype,
        parent=None,
    )
    return conv.apply({"params": layer.variables["params"]}, x)


def training_step(branch: Branch, batch: int, side: int, flax: bool) -> tuple[Callable, Any]:
    """(step, state), where step: state → (state, loss), and a state is (params, batch_stats, momentum)."""
    rng, tap = np.random.default_rng(SEED), list(branch.feature_info)[-1]
    x = jnp.asarray(rng.normal(size=(batch, side, side, 3)), jnp.float32)
    label = jnp.asarray(rng.integers(0, 10, batch))
    classifier = jnp.asarray(0.1 * rng.normal(size=(branch.feature_info[tap].channels, 10)), jnp.float32)
    optimizer = optax.sgd(0.1, momentum=0.9)
    variables = jax.jit(lambda x: branch.init(jax.random.key(SEED), x, taps=(tap,), train=False))(x)
    params = {"branch": variables["params"], "classifier": classifier}
    state = params, variables.get("batch_stats", {}), optimizer.init(params)

    def step(state, x, label):
        params, stats, momentum = state

        def loss_fn(params):
            given = {"params": params["branch"], "batch_stats": stats}
            with nn.intercept_methods(as_flax) if flax else contextlib.nullcontext():
                features, changed = branch.apply(given, x, taps=(tap,), train=True, mutable=["batch_stats"])
            logits = features[tap].vector.astype(jnp.float32) @ params["classifier"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), changed["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return (optax.apply_updates(params, updates), stats, momentum), loss

    traced = jax.jit(step, donate_argnums=0).trace(state, x, label)
    ours = "depthwise_convolve" in str(traced.jaxpr)
    if ours == flax:
        raise SystemExit(f"error: the step {'has' if ours else 'lacks'} our depthwise convolution where it must not")
    compiled = traced.lower().compile()
    return lambda state: compiled(state, x, label), state


def compare_steps(branch: Branch, batch: int, side: int, rounds: int, say: Callable) -> dict[str, float]:
    """Trains one branch in two ways; name → figure."""
    coarse = branch.dtype != jnp.float32 or jax.default_backend() != "cpu"
    steps, states, found = {}, {}, {}
    for who in ("auto", "nn.Conv"):
        steps[who], state = training_step(branch, batch, side, flax=who != "auto")
        states[who], loss = steps[who](state)
        # The momentum of a first step is its gradient.
        found[who] = float(loss), np.concatenate([np.ravel(m) for m in jax.tree.leaves(states[who][2])])
    (loss, grads), (their_loss, their_grads) = found.values()
    apart = {"loss": abs(loss / their_loss - 1), "gradient": np.linalg.norm(grads - their_grads) / np.linalg.norm(their_grads)}
    # The network magnifies rounding: parameters moved by 1e-7 of themselves move its gradient by 7e-3 of its norm, so that
    # of anything coarser than float32 only the loss can tell.
    for name, allowed in dict(loss=2e-2 if coarse else 1e-4, gradient=math.inf if coarse else 3e-2).items():
        if not apart[name] <= allowed:
            raise SystemExit(
                f"error: step: the {name} differs from that of nn.Conv by {apart[name]:.1e} (allowed: {allowed:.0e})"
            )
    seconds = {who: [] for who in steps}
    for i in range(rounds + 1):
        for who in list(steps)[:: -1 if i % 2 else 1]:
            began = time.perf_counter()
            states[who], loss = steps[who](states[who])
            jax.block_until_ready((states[who], loss))
            if i:  # the first round warms up
                seconds[who].append(time.perf_counter() - began)
    auto, flax = (np.array(s) for s in seconds.values())
    figures = spread("step auto ms", auto * 1e3, 2) | spread("step nn.Conv ms", flax * 1e3, 2)
    figures |= spread("step nn.Conv / auto", flax / auto, 3)
    auto_ms, flax_ms, ratio = (said(figures, f"step {name}") for name in ("auto ms", "nn.Conv ms", "nn.Conv / auto"))
    say(f"step, batch {batch} of {side} pixels: auto {auto_ms} ms, nn.Conv {flax_ms} ms; nn.Conv / auto {ratio}")
    say(f"at the first step losses differ by {apart['loss']:.0e}, gradients by {apart['gradient']:.0e}")
    return figures


# ----------------------------------------------------------------------- both


def spread(name: str, values: np.ndarray, digits: int) -> dict[str, float]:
    """Median and quartiles, under names of their own."""
    of = {"": 0.5, " lower quartile": 0.25, " upper quartile": 0.75}
    return {name + which: round(float(np.quantile(values, share)), digits) for which, share in of.items()}


def said(figures: dict[str, float], name: str) -> str:
    """A figure with its quartiles, in words."""
    median, low, high = (short(figures[name + which]) for which in ("", " lower quartile", " upper quartile"))
    return f"{median} ({low}–{high})"


def short(value: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--shapes", default=SHAPES, help="x, k and the side of the kernel, s and the stride; with commas between"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no_lax", action="store_true", help="check against lax, but do not time it")
    parser.add_argument("--only", choices=("ops", "step"), help="one of the two parts")
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    if min(options.rounds, options.batch) < 1:
        raise SystemExit("error: --rounds and --batch are at least 1")
    shapes = [Shape.parse(text) for text in options.shapes.split(",")]
    # Lines are as wide as the table needs.
    console, figures = Console(highlight=False, soft_wrap=True, width=140), {}
    theirs = f"torch {torch.__version__}" if torch is not None else "no torch (pip install 'mgjax[bench]')"
    console.print(
        f"{datetime.date.today()}, jax {jax.__version__}, {theirs}, {hardware()}; {options.dtype}, {options.rounds} rounds, "
        f"seed {SEED}; medians and quartiles"
    )
    if options.only != "step":
        figures |= compare_ops(shapes, options.dtype, options.rounds, not options.no_lax, console.print)
    if options.only != "ops":
        branch = NAMED_BRANCHES["mobilenet_v2_cifar"](dtype=jnp.dtype(options.dtype))
        figures |= compare_steps(branch, options.batch, 32, options.rounds, console.print)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
