"""What a training step communicates, read from its compiled program, and how it would scale: a prediction.

    python -m experiments.benchmarks.scaling [--batch=1024] [--mfu=0.075] [--json=FILE]

The joint stage of the ImageNet recipe (a tapped ResNet-50 of three levels, 224 pixels, bfloat16) is compiled for 8
virtual devices of this CPU, and never run. Each collective of the program is counted with what a ring puts on the
wire, and laid to what it carries. From those bytes, the counted FLOPs and stated link speeds follow step times on
8, 64 and 512 GPUs. SCALING.md has the formulas, the assumptions and the tables printed here.
"""

from __future__ import annotations

import os

# Read when JAX starts its devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from experiments.imagenet_mg import RECIPES, SIZES, Config
from experiments.vision import build_model
from mgjax import Taxonomy
from mgjax.config import override
from mgjax.contracts import Batch
from mgjax.data import Augment
from mgjax.errors import InputError
from mgjax.flops import count_jaxpr
from mgjax.objective import Objective
from mgjax.train.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from mgjax.train.meter import peak_flops
from mgjax.train.monitor import hardware
from mgjax.train.optim import make_optimizer
from mgjax.train.state import create_state, needed_paths, state_shardings
from mgjax.train.step import make_train_step

LEVELS = {"groups20": 20, "groups150": 150, "class": 1000}
GRADIENTS, GATHERS, STATISTICS, SCALARS, OTHER = CARRIED = (
    "parameter gradients", "parameter gathers", "batch-norm statistics", "scalars", "other",
)  # fmt: skip
# -------------------------------------------------------------------- reading a program

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
        "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.M)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Array(NamedTuple):
    """One array that a collective carries, whole: before a reduce-scatter, behind an all-gather."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        # Types of 8 bits and fewer say so themselves: f8e4m3fn, f4e2m1fn.
        bits = BITS.get(self.dtype) or int(re.match(r"f(\d)", self.dtype)[1])
        return -(-math.prod(self.shape) * bits // 8)


class Collective(NamedTuple):
    """A collective instruction.

    Attributes:
        kind: one of `KINDS`.
        arrays: what it carries; several where XLA has combined them.
        group: devices that take part in each of its rings.
    """

    kind: str
    arrays: tuple[Array, ...]
    group: int


def wire_bytes(kind: str, size: int, group: int) -> float:
    """Bytes that each device of a ring sends for a collective of `size` bytes, measured whole.

    Example:
        >>> [wire_bytes(kind, 800, 8) for kind in ("all-reduce", "all-gather", "collective-permute")]
        [1400.0, 700.0, 800]
    """
    if kind == "collective-permute":
        return size
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group * size


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a program in HLO's text form, each once, whether synchronous or begun by `-start`.

    Args:
        devices: of the whole program, which are one group where none is named.
    """
    found = []
    for types, kind, start, rest in _INSTRUCTION.findall(text):
        arrays = [Array(d, tuple(int(n) for n in s.split(",") if n)) for d, s in _ARRAY.findall(types)]
        if start and kind != "all-reduce":  # (operands, results, and perhaps counters)
            while len(arrays) > 2 and arrays[-1].dtype in ("u32", "s32") and not arrays[-1].shape:
                arrays.pop()
            arrays = arrays[len(arrays) // 2 :]
        group = _group(rest, devices)
        if kind == "reduce-scatter":
            axis = int(re.search(r"dimensions=\{(\d+)\}", rest)[1])
            arrays = [Array(d, (*s[:axis], s[axis] * group, *s[axis + 1 :])) for d, s in arrays]
        found.append(Collective(kind, tuple(arrays), group))
    return found


def _group(attributes: str, devices: int) -> int:
    """Devices of one replica group, in any of the forms in which HLO writes groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\([^)]*(?:\([\d,]*\))?\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return devices


# -------------------------------------------------------------------- what carries what


class Kept(NamedTuple):
    """What a step keeps: path → shape.

    Attributes:
        params: that it trains.
        split: of those, the paths of what lies in parts on the axis `fsdp`.
        fsdp: devices along that axis.
        heads: of which each has a loss, which travel as one vector.
    """

    params: dict[str, tuple[int, ...]]
    split: frozenset[str]
    statistics: dict[str, tuple[int, ...]]
    fsdp: int
    heads: int = 0


@dataclasses.dataclass
class Traffic:
    """Of one step.

    Attributes:
        instructions: kind → how many the program has.
        arrays, bytes, wire: what is carried → number of arrays, their bytes, and what a device sends in a ring.
        split: bytes of the gradients of parameters that lie in parts.
        scattered: as the wire of the gradients, if those were reduce-scattered along `fsdp`, then reduced along `data`.
    """

    instructions: collections.Counter
    arrays: collections.Counter
    bytes: collections.Counter
    wire: collections.Counter
    split: int = 0
    scattered: float = 0.0


def traffic(found: Iterable[Collective], kept: Kept) -> Traffic:
    """Lays every array of every collective to what it carries.

    Shapes decide. Of the reductions in the shape of a parameter, as many are gradients as there are such
    parameters; those beyond them, in the shape of a statistic, are reductions of batch norms. (A norm
    reduces five vectors: two forward, three backward, of which two are gradients of its scale and shift.)
    """
    shape = lambda dims: tuple(sorted(n for n in dims if n != 1))
    due = collections.Counter(shape(dims) for dims in kept.params.values())
    split = {shape(kept.params[path]) for path in kept.split}
    statistics = {shape(dims) for dims in kept.statistics.values()}
    result = Traffic(*(collections.Counter() for _ in range(4)))
    for one in found:
        result.instructions[one.kind] += 1
        for array in one.arrays:
            key, wire = shape(array.shape), wire_bytes(one.kind, array.bytes, one.group)
            if not key:
                what = SCALARS
            elif one.kind == "all-gather":
                what = GATHERS if key in split else OTHER
            elif one.kind in ("all-reduce", "reduce-scatter") and due[key]:
                due[key] -= 1
                what = GRADIENTS
                if key in split:
                    result.split += array.bytes
                    across = wire_bytes("all-reduce", array.bytes // kept.fsdp, one.group // kept.fsdp)
                    result.scattered += wire_bytes("reduce-scatter", array.bytes, kept.fsdp) + across
                else:
                    result.scattered += wire
            elif one.kind in ("all-reduce", "reduce-scatter") and key in statistics:
                what = STATISTICS
            elif key == (kept.heads,):
                what = SCALARS
            else:
                what = OTHER
            result.arrays[what] += 1
            result.bytes[what] += array.bytes
            result.wire[what] += wire
    return result


# -------------------------------------------------------------------- compiling a step


def recipe(batch: int, **changes) -> Config:
    """The ImageNet recipe for accelerators, with a global batch of so many images."""
    values = SIZES["gpu"] | RECIPES["large", "gpu"] | {"preset": "taps", "plan.batch_size": batch}
    return override(Config(), values | {name.replace("__", "."): value for name, value in changes.items()})


def tree(levels: Mapping[str, int] = LEVELS) -> Taxonomy:
    """Even groups: name of a level → number of classes, coarse to fine."""
    names, sizes = list(levels), list(levels.values())
    return Taxonomy.from_names(
        {level: [f"{level}-{i}" for i in range(n)] for level, n in levels.items()},
        {names[i]: [c * sizes[i - 1] // n for c in range(n)] for i, n in enumerate(sizes) if i},
    )


def traced_step(config: Config, mesh: Mesh, levels: Mapping[str, int] = LEVELS):
    """(the train step of the joint stage, traced for abstract arguments; what it keeps; its state, abstract)."""
    taxonomy, side, stored = tree(levels), config.augment.size, config.data.image_size
    model = build_model(config.model, config.preset, taxonomy, (side, side, 3))
    augment = Augment.from_config(config.augment, (120.0,) * 3, (60.0,) * 3, (stored, stored, 3))
    rows = config.plan.batch_size
    if rows % mesh.size:
        raise InputError(f"a batch of {rows} cannot be divided among {mesh.size} devices: --batch")
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))
    batch = Batch(
        {"image": array(jnp.uint8, stored, stored, 3)}, {l: array(jnp.int32) for l in levels}, array(bool), array(jnp.int32)
    )
    inputs = jax.eval_shape(lambda b: augment.normalise(b).inputs, batch)
    optimizer, above = make_optimizer(config.optim), config.mesh.shard_above
    state = jax.eval_shape(lambda: create_state(model, optimizer, inputs, 0, mesh, above))
    shardings = state_shardings(state, mesh, above)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    step = make_train_step(
        model, Objective(model.tasks, model.heads, smoothing=config.smoothing), augment, optimizer, 0,
        mesh=mesh, shardings=shardings,
    )  # fmt: skip
    trains = needed_paths(model, model.everything, inputs)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    traced = step.trace(state, batch, rate, op=model.everything, trains=trains, strength=1.0)
    params = {path: x for path, x in flatten_dict(state.params, sep="/").items() if path in trains}
    shapes = lambda flat: {path: x.shape for path, x in flat.items()}
    split = frozenset(path for path, x in params.items() if "fsdp" in x.sharding.spec)
    statistics = shapes(flatten_dict(state.stats, sep="/"))
    return traced, Kept(shapes(params), split, statistics, mesh.shape["fsdp"], len(model.heads)), state


def programs(traced) -> tuple[str, str]:
    """(the program as XLA partitions it for the devices, the program compiled for this backend), in text form.

    The first is what every backend starts from; the CPU's goes on to reduce bfloat16 in float32.
    """
    with tempfile.TemporaryDirectory() as folder, _no_cache():
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = traced.lower().compile(compiler_options=options).as_text()
        name = re.match(r"HloModule ([\w.-]+)", compiled)[1]
        dumped = [p.read_text() for p in pathlib.Path(folder).glob(f"*{name}.*after_spmd-partitioning*.txt")]
    if not dumped:
        raise InputError(f"jax {jax.__version__}: XLA wrote no program behind its partitioning")
    return dumped[0], compiled


@contextlib.contextmanager
def _no_cache():
    """What comes from the compilation cache runs no pass, and dumps none."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


# -------------------------------------------------------------------- the prediction


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs.

    Attributes:
        gpus: of a node.
        inside, between: bytes a second that a GPU sends inside its node, and to others.
        attained: share of those that large collectives reach.
        base, hop_inside, hop_between: seconds of a small reduction along a tree, and of each of its hops, as NCCL's
            own tuner reckons for its low-latency protocol (src/graph/tuning.cc).
        slower: factor on the hops inside where there are several nodes, likewise.
        bucket: bytes up to which XLA combines collectives of one kind.
        peak: dense bfloat16 FLOP/s of a GPU.
    """

    gpus: int = 8
    inside: float = 450e9
    between: float = 50e9
    attained: float = 0.8
    base: float = 4.4e-6
    hop_inside: float = 0.52e-6
    hop_between: float = 5.0e-6
    slower: float = 1.8
    bucket: int = 30 * 2**20
    peak: float = peak_flops("NVIDIA H100")

    def half(self, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes inside a node."""
        return (self.gpus - 1) / self.gpus * size / (self.attained * self.inside)

    def across(self, size: float, nodes: int) -> float:
        """Seconds of an all-reduce between nodes, each GPU with its own share of `size` bytes, over its own link."""
        return 2 * (nodes - 1) / nodes * size / self.gpus / (self.attained * self.between)

    def all_reduce(self, size: float, nodes: int) -> float:
        """Seconds of an all-reduce over everything: scattered inside, reduced between, gathered inside."""
        return 2 * self.half(size) + self.across(size, nodes)

    def latency(self, nodes: int) -> float:
        """Seconds of a reduction of a few bytes over everything."""
        inside = (self.gpus - 1) * self.hop_inside * (self.slower if nodes > 1 else 1)
        return self.base + 2 * (inside + math.ceil(math.log2(nodes)) * self.hop_between)


class Load(NamedTuple):
    """What one step asks of each device.

    Attributes:
        flops: of dot products and convolutions.
        gradients, split, gathers, statistics: bytes of parameter gradients, of those of them that `fsdp` splits, of
            parameters to gather, of batch statistics.
        norms: batch norms, each of which waits for one small reduction forward and one backward.
    """

    flops: float
    gradients: float
    split: float
    gathers: float
    statistics: float
    norms: int


STRATEGIES = ("data", "fsdp in the node × data", "the same, gradients scattered")


class Prediction(NamedTuple):
    """Seconds of a step on one of many GPUs, and its efficiency against computing alone, overlapped or not."""

    compute: float
    waiting: float
    gradients: float
    gathers: float
    serial: float
    overlapped: float


def predict(load: Load, nodes: int, strategy: str, mfu: float, cluster: Cluster = Cluster()) -> Prediction:
    """The formulas of SCALING.md.

    Args:
        nodes: of `cluster.gpus` GPUs.
        strategy: one of `STRATEGIES`.
        mfu: share of the peak at which one GPU computes.
    """
    compute = load.flops / (mfu * cluster.peak)
    waiting = 2 * load.norms * cluster.latency(nodes) + cluster.all_reduce(load.statistics, nodes)

    def reduced(size: float, split: float) -> float:
        if strategy != STRATEGIES[2]:
            return cluster.all_reduce(size, nodes)
        return cluster.all_reduce(size - split, nodes) + cluster.half(split) + cluster.across(split, nodes)

    buckets = lambda size: math.ceil(size / cluster.bucket)
    gradients = reduced(load.gradients, load.split) + buckets(load.gradients) * cluster.latency(nodes)
    held = 0 if strategy == "data" else load.gathers
    gathers = cluster.half(held) + buckets(held) * cluster.latency(1)
    # The last bucket has nothing left to hide behind, nor has the first gather.
    share = lambda size: min(1.0, cluster.bucket / size) if size else 0.0
    shown = max(gradients - 2 / 3 * compute, gradients * share(load.gradients))
    shown += max(gathers - compute / 3, gathers * share(held))
    return Prediction(
        compute, waiting, gradients, gathers,
        serial=compute / (compute + waiting + gradients + gathers), overlapped=compute / (compute + waiting + shown),
    )  # fmt: skip


# -------------------------------------------------------------------- the tables


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def traffic_table(partitioned: Mapping[str, Traffic], compiled: Mapping[str, Traffic]) -> str:
    """Mesh → traffic: MB of the arrays, and MB that a device sends in a ring."""
    rows = []
    for mesh, t in partitioned.items():
        on_cpu = compiled[mesh]
        for what in (w for w in CARRIED if t.arrays[w]):
            sizes = t.bytes[what], t.wire[what], on_cpu.wire[what]
            rows.append([mesh, what, str(t.arrays[what]), *(f"{size / 1e6:.3f}" for size in sizes)])
        sizes = t.bytes.total(), t.wire.total(), on_cpu.wire.total()
        rows.append([mesh, "all", str(t.arrays.total()), *(f"{size / 1e6:.3f}" for size in sizes)])
    return markdown(["mesh", "what", "arrays", "MB", "MB on the wire", "the same, on the CPU"], rows)


def mesh_table(partitioned: Mapping[str, Traffic], compiled: Mapping[str, Traffic], held: Mapping[str, float]) -> str:
    """Mesh → what scattering would save, what a device holds, and the instructions that XLA made."""
    rows = []
    for mesh, t in partitioned.items():
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(compiled[mesh].instructions.items()))
        rows.append([mesh, f"{t.wire[GRADIENTS] / 1e6:.3f}", f"{t.scattered / 1e6:.3f}", f"{held[mesh]:.1f}", counts])
    head = ["mesh", "gradients, MB on the wire", "if scattered", "MB of state a device", "instructions, combined by the CPU"]
    return markdown(head, rows)


def predictions(load: Load, mfus: Sequence[float], nodes: Sequence[int] = (1, 8, 64)) -> dict[tuple, Prediction]:
    """(MFU, strategy, nodes) → prediction."""
    return {(mfu, s, n): predict(load, n, s, mfu) for mfu in mfus for s in STRATEGIES for n in nodes}


def prediction_table(found: Mapping[tuple, Prediction]) -> str:
    rows = []
    for (mfu, strategy, nodes), p in found.items():
        milliseconds = [f"{s * 1e3:.2f}" for s in (p.compute, p.waiting, p.gradients, p.gathers)]
        gpus = str(nodes * Cluster().gpus)
        rows.append([strategy, f"{mfu:g}", gpus, *milliseconds, f"{p.serial:.1%}", f"{p.overlapped:.1%}"])
    head = ["strategy", "MFU", "GPUs", "compute ms", "norms ms", "gradients ms", "gathers ms", "no overlap", "overlap"]
    return markdown(head, rows)


def measure(batch: int, devices: Sequence) -> tuple[dict[str, Traffic], dict[str, Traffic], dict[str, float], Load]:
    """(mesh → traffic as partitioned, the same as compiled for this CPU, mesh → MB of state a device, load)."""
    partitioned, compiled, held = {}, {}, {}
    for name, size in {"data=8": 1, "fsdp=8": 8, "data=2, fsdp=4": 4}.items():
        mesh = make_mesh(MeshConfig(fsdp=size), devices)
        traced, kept, state = traced_step(recipe(batch), mesh)
        for tables, text in zip((partitioned, compiled), programs(traced)):
            tables[name] = traffic(collectives(text, mesh.size), kept)
        shards = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)]
        held[name] = sum(shards) / 1e6
    whole, split = partitioned["data=8"], partitioned["fsdp=8"]
    load = Load(
        flops=count_jaxpr(traced.jaxpr.jaxpr).matmul / mesh.size,
        gradients=whole.bytes[GRADIENTS],
        split=split.split,
        gathers=split.bytes[GATHERS],
        statistics=whole.bytes[STATISTICS],
        norms=sum(path.endswith("/mean") for path in kept.statistics),
    )
    return partitioned, compiled, held, load


def figures_of(partitioned, compiled, held, load: Load, found: Mapping[tuple, Prediction]) -> dict[str, float]:
    """name → figure."""
    figures: dict[str, float] = {f"{name} of a step and device": value for name, value in load._asdict().items()}
    for form, tables in (("partitioned", partitioned), ("compiled for CPU", compiled)):
        for mesh, t in tables.items():
            for what in CARRIED:
                if t.arrays[what]:
                    figures[f"{mesh}, {form}: {what}, bytes"] = t.bytes[what]
                    figures[f"{mesh}, {form}: {what}, bytes on the wire"] = round(t.wire[what])
            figures[f"{mesh}, {form}: gradients if scattered, bytes on the wire"] = round(t.scattered)
            figures |= {f"{mesh}, {form}: {kind} instructions": n for kind, n in t.instructions.items()}
    figures |= {f"{mesh}: bytes of state on a device": round(mb * 1e6) for mesh, mb in held.items()}
    for (mfu, strategy, nodes), p in found.items():
        figures |= {f"{strategy}, {nodes * 8} GPUs, MFU {mfu:g}: {k}": round(v, 6) for k, v in p._asdict().items()}
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="images of a step on 8 devices")
    parser.add_argument("--mfu", type=float, nargs="+", default=[0.075, 0.18], help="shares of the peak to predict with")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        if len(jax.devices()) < 8 or min(options.mfu) <= 0:
            raise InputError(
                f"8 devices and an MFU above 0 are needed, not {len(jax.devices())} and {min(options.mfu)}; without XLA_FLAGS "
                "in the environment this script makes 8 of the CPU"
            )
        partitioned, compiled, held, load = measure(options.batch, jax.devices()[:8])
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    found, rows = predictions(load, options.mfu), options.batch // 8
    print(f"jax {jax.__version__}, {hardware()}; nothing was run\n")
    print(f"{rows} images a device: {load.flops / 1e9:,.1f} GFLOP a device, {load.flops / rows / 1e9:.2f} GFLOP an image\n")
    print(f"{traffic_table(partitioned, compiled)}\n\n{mesh_table(partitioned, compiled, held)}\n")
    print(f"Predicted, not measured:\n\n{prediction_table(found)}")
    if options.json:
        figures = figures_of(partitioned, compiled, held, load, found)
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
