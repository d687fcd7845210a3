"""A training step of ResNet-50 in bfloat16: ours against plain Flax and against PyTorch, images a second.

    python -m experiments.benchmarks.train_step [--batch=256] [--rounds=7] [--steps=10] [--json=FILE]
    python -m experiments.benchmarks.train_step --size=small    # a tiny network: does all of it run?

All take the same uint8 images, resident on one device, normalise them and step by SGD with Nesterov momentum. Ours is
`make_train_step` with the flat model, and with three tapped granularities as a further row; Flax is a network and a step
written here; PyTorch is the same in channels_last under autocast and torch.compile. Each round times every case once, in
turn; printed are medians, and ratios round by round with their range. What is missing is left out, and said.
"""

from __future__ import annotations

import os

# JAX and PyTorch share one GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from mgjax import Granularity, Head, MultiGranularityModel, Task
from mgjax.branches import ResNet
from mgjax.contracts import Batch
from mgjax.flops import count_jaxpr
from mgjax.objective import Objective
from mgjax.train import OptimConfig
from mgjax.train.mesh import make_mesh, scalar_to_device, to_device
from mgjax.train.meter import peak_flops
from mgjax.train.monitor import hardware
from mgjax.train.optim import make_optimizer
from mgjax.train.state import count_params, create_state, needed_paths
from mgjax.train.step import make_train_step

RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-5
MEAN, STD = 120.0, 60.0  # of the pixels


class Network(NamedTuple):
    """A bottleneck ResNet (stride on the 3×3): blocks and channels per stage, side of its images, level → classes."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    side: int
    levels: Mapping[str, int]

    @property
    def classes(self) -> int:
        return list(self.levels.values())[-1]


SIZES = {
    "full": Network((3, 4, 6, 3), (64, 128, 256, 512), 224, {"groups20": 20, "groups150": 150, "class": 1000}),
    "small": Network((1, 1, 1), (8, 16, 32), 32, {"groups2": 2, "groups5": 5, "class": 10}),
}


class Case(NamedTuple):
    """Something to time.

    Attributes:
        run: steps so many times and waits for the device.
        params: numbers that are trained.
        flops: of a step's dot products and convolutions; None where it is the same model as another's.
    """

    run: Callable[[int], None]
    params: int
    flops: int | None


def examples(network: Network, batch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """uint8 images [B, side, side, 3] and labels by level, drawn at random."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, network.side, network.side, 3), dtype=np.uint8)
    return images, {level: rng.integers(0, n, batch).astype(np.int32) for level, n in network.levels.items()}


def repeated(step: Callable, state: Any) -> Callable[[int], None]:
    """A function that runs state → (state, scalars) so many times, from where it was, and waits."""

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, seen = step(state)
        jax.block_until_ready((state, seen))

    return run


# ----------------------------------------------------------------------- ours


def model_of(network: Network, levels: Sequence[str]) -> MultiGranularityModel:
    """The network tapped at its last stages, one for each level, as the form `taps` of the experiments."""
    tap = {level: f"stage{len(network.blocks) - len(levels) + 1 + i}" for i, level in enumerate(levels)}
    return MultiGranularityModel(
        [Granularity(l, "trunk", tap[l]) for l in levels],
        [Task(l, l, network.levels[l], l) for l in levels],
        [Head(l, {l: "grad"} | {finer: "stop" for finer in levels[i + 1 :]}) for i, l in enumerate(levels)],
        {"trunk": ResNet(blocks=network.blocks, widths=network.widths, kind="bottleneck", dtype=jnp.bfloat16)},
    )


def ours(network: Network, batch: int, levels: Sequence[str]) -> Case:
    model, mesh = model_of(network, levels), make_mesh(devices=jax.devices()[:1])
    images, labels = examples(network, batch)
    batch_of = Batch({"image": images}, {l: labels[l] for l in levels}, np.ones(batch, bool), np.arange(batch, dtype=np.int32))

    def normalise(batch: Batch, rng=None, strength: float = 0.0) -> Batch:
        image = (batch.inputs["image"].astype(jnp.float32) - MEAN) / STD
        return batch.replace(inputs={"image": image})

    inputs = jax.eval_shape(lambda b: normalise(b).inputs, batch_of)
    optimizer = make_optimizer(OptimConfig(momentum=MOMENTUM, weight_decay=DECAY))
    state = create_state(model, optimizer, inputs, 0, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    objective = Objective(model.tasks, model.heads)
    step = make_train_step(model, objective, normalise, optimizer, 0, mesh=mesh, shardings=shardings)
    resident, rate = to_device(batch_of, mesh), scalar_to_device(RATE, mesh)
    op, trains = model.everything, needed_paths(model, model.everything, inputs)
    traced = step.trace(state, resident, rate, op=op, trains=trains, strength=0.0)
    compiled = traced.lower().compile()
    run = repeated(lambda state: compiled(state, resident, rate), state)
    return Case(run, count_params(state, trains), count_jaxpr(traced.jaxpr.jaxpr).matmul)


# ----------------------------------------------------------------------- plain Flax


class FlaxBlock(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=jnp.bfloat16)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), (self.stride,) * 2, padding=1)(y)))
        y = norm(scale_init=nn.initializers.zeros_init())(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), (self.stride,) * 2)(x))
        return nn.relu(x + y)


class FlaxResNet(nn.Module):
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        """x: float [B, H, W, 3] → float32 [B, classes]."""
        x = nn.Conv(self.widths[0], (7, 7), (2, 2), padding=3, use_bias=False, dtype=jnp.bfloat16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=jnp.bfloat16)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, (count, width) in enumerate(zip(self.blocks, self.widths)):
            for j in range(count):
                x = FlaxBlock(width, 2 if i and not j else 1)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)).astype(jnp.float32))


def plain_flax(network: Network, batch: int) -> Case:
    model = FlaxResNet(network.blocks, network.widths, network.classes)
    images, labels = examples(network, batch)
    images, label = jax.device_put((images, labels["class"]), jax.devices()[0])
    decay = optax.add_decayed_weights(DECAY, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    tx = optax.chain(decay, optax.sgd(RATE, MOMENTUM, nesterov=True))

    @jax.jit
    def init(rng):
        variables = model.init(rng, jnp.zeros((1, network.side, network.side, 3)), train=False)
        return variables["params"], variables["batch_stats"], tx.init(variables["params"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, label):
        params, stats, opt_state = state

        def loss_fn(params):
            x = (images.astype(jnp.float32) - MEAN) / STD
            logits, changed = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), changed["batch_stats"]

        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), new_stats, opt_state), loss

    state = init(jax.random.key(0))
    traced = step.trace(state, images, label)
    compiled = traced.lower().compile()
    params = sum(p.size for p in jax.tree.leaves(state[0]))
    return Case(repeated(lambda state: compiled(state, images, label), state), params, count_jaxpr(traced.jaxpr.jaxpr).matmul)


# ----------------------------------------------------------------------- PyTorch


def torch_model(network: Network):
    """The network as a torch module: float [B, 3, H, W] → [B, classes]."""
    from torch import nn as tnn
    from torch.nn import functional as F

    conv = lambda i, o, k, s=1: tnn.Conv2d(i, o, k, s, padding=k // 2, bias=False)

    class Block(tnn.Module):
        def __init__(self, inputs: int, width: int, stride: int):
            super().__init__()
            outputs = 4 * width
            self.convs = tnn.ModuleList([conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1)])
            self.norms = tnn.ModuleList([tnn.BatchNorm2d(width), tnn.BatchNorm2d(width), tnn.BatchNorm2d(outputs)])
            tnn.init.zeros_(self.norms[2].weight)
            same = inputs == outputs and stride == 1
            self.shortcut = (
                tnn.Identity() if same else tnn.Sequential(conv(inputs, outputs, 1, stride), tnn.BatchNorm2d(outputs))
            )

        def forward(self, x):
            y = F.relu(self.norms[0](self.convs[0](x)))
            y = F.relu(self.norms[1](self.convs[1](y)))
            return F.relu(self.shortcut(x) + self.norms[2](self.convs[2](y)))

    channels = network.widths[0]
    layers = [conv(3, channels, 7, 2), tnn.BatchNorm2d(channels), tnn.ReLU(), tnn.MaxPool2d(3, 2, 1)]
    for i, (count, width) in enumerate(zip(network.blocks, network.widths)):
        for j in range(count):
            layers.append(Block(channels, width, 2 if i and not j else 1))
            channels = 4 * width
    return tnn.Sequential(*layers, tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(channels, network.classes))


def in_torch(network: Network, batch: int, device: str, compile: Callable | None) -> Case:
    """A step of PyTorch on "cuda" or "cpu", warmed up.

    Args:
        compile: `torch.compile`, or None for eager execution.
    """
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = torch_model(network).to(device, memory_format=torch.channels_last).train()
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, nesterov=True)
    images, labels = examples(network, batch)
    # Channels last in memory, as the arrays of the others.
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    label = torch.from_numpy(labels["class"]).long().to(device)

    def loss_of(images, label):
        with torch.autocast(device, torch.bfloat16):
            logits = model((images.float() - MEAN) / STD)
        return F.cross_entropy(logits.float(), label)

    forward = compile(loss_of) if compile else loss_of

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            forward(images, label).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    run(2)
    return Case(run, sum(p.numel() for p in params), None)


def torch_case(network: Network, batch: int, say: Callable, compile: Callable | None = None) -> tuple[str, Case] | None:
    """(name, case) on the device that JAX uses, or None; whatever is given up is said.

    Args:
        compile: by default `torch.compile` on a GPU; a CPU runs eagerly.
    """
    try:
        import torch
    except ImportError:
        say("PyTorch is not installed: ours and Flax alone")
        return None
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        say(f"PyTorch {torch.__version__} sees no GPU: ours and Flax alone")
        return None
    compile = compile or (torch.compile if device == "cuda" else None)
    if compile:
        try:
            return "PyTorch, compiled", in_torch(network, batch, device, compile)
        except Exception as error:  # a missing compiler, or whatever else of many layers fails
            say(f"torch.compile failed ({_line(error)}): PyTorch runs eagerly, and is slower for it")
    else:
        say("PyTorch runs eagerly: torch.compile is for a GPU here")
    try:
        return "PyTorch, eager", in_torch(network, batch, device, None)
    except Exception as error:
        say(f"PyTorch failed ({_line(error)}): ours and Flax alone")
        return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


# ----------------------------------------------------------------------- all of them


def measure(network: Network, batch: int, rounds: int, steps: int, say: Callable[[str], None]):
    """(name → case, name → seconds of a step [rounds])."""
    levels = list(network.levels)
    cases = {
        "ours": ours(network, batch, levels[-1:]),
        f"ours, {len(levels)} granularities": ours(network, batch, levels),
        "Flax": plain_flax(network, batch),
    }
    cases |= dict(filter(None, [torch_case(network, batch, say)]))
    seconds = {name: [] for name in cases}
    for i in range(rounds + 1):
        first = i % len(cases)  # nobody always runs behind the same one
        for name in [*list(cases)[first:], *list(cases)[:first]]:
            began = time.perf_counter()
            cases[name].run(steps)
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / steps)
    return cases, {name: np.array(s) for name, s in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--batch", type=int, help="images of a step (default: 256; 16 of the small network)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="timed together in a round (default: 10; 2 of the small network)")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    full = options.size == "full"
    batch = (256 if full else 16) if options.batch is None else options.batch
    steps = (10 if full else 2) if options.steps is None else options.steps
    if min(batch, steps, options.rounds) < 1:
        raise SystemExit("error: --batch, --steps and --rounds are at least 1")
    network, console = SIZES[options.size], Console(highlight=False)
    console.print(
        f"jax {jax.__version__}, {hardware()}; {options.size} network, batch {batch} of {network.side} pixels, bfloat16; "
        f"{options.rounds} rounds of {steps} steps on one device"
    )
    cases, seconds = measure(network, batch, options.rounds, steps, console.print)
    figures, table, peak = {}, Table(), peak_flops()
    for column in ("step", "images/s", "range", "MFU", "parameters"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, s in seconds.items():
        rates = batch / s
        figures |= spread(f"{name} images/s", rates, 1)
        flops = cases[name].flops or cases["Flax"].flops
        if peak:
            figures[f"{name} MFU"] = round(flops / float(np.median(s)) / peak, 4)
        mfu = f"{figures[f'{name} MFU']:.1%}" if peak else "–"
        row = [f"{np.median(rates):.1f}", f"{rates.min():.1f}–{rates.max():.1f}", mfu, f"{cases[name].params:,}"]
        table.add_row(name, *row)
    console.print(table)
    if not peak:
        console.print("no MFU: the peak of this device is not known")
    for name in list(seconds)[1:]:
        ratio = spread(f"ours / {name}", seconds[name] / seconds["ours"], 3)
        low, high = ratio[f"ours / {name} smallest"], ratio[f"ours / {name} largest"]
        console.print(f"speed, ours / {name}: {ratio[f'ours / {name}']:.3f}× ({low:.3f}–{high:.3f})")
        figures |= ratio
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def spread(name: str, values: np.ndarray, digits: int) -> dict[str, float]:
    """Median, smallest and largest, under names of their own."""
    of = {"": np.median(values), " smallest": values.min(), " largest": values.max()}
    return {name + which: round(float(v), digits) for which, v in of.items()}


if __name__ == "__main__":
    main()
