"""Weights that others trained, as parameters of our branches.

A table of `Rule`s says where each tensor of a file belongs; `fill` follows it and loads all or nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mgjax.branches import Branch, MobileNetV1
from mgjax.branches.base import per_stage
from mgjax.errors import InputError

SHOWN = 20  # problems of a kind that one message lists


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Where the tensors belong whose whole name matches a pattern.

    Attributes:
        pattern: regular expression.
        path: of our leaf, with "/" between keys; groups of the pattern as in `re.Match.expand` ("\1"). None for a tensor
            that is left out on purpose.
        axes: from the file's axes to ours, a letter each, as in "ohwi->hwio"; those that fall away must have one position.
            "" leaves them.
    """

    pattern: str
    path: str | None
    axes: str = ""


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
        branch: the module.
        variables: of it; float32.
        classifier: `kernel` [C, classes] and `bias` [classes] of the dense layer behind the vector of `tap`.
        tap: the deepest one.
    """

    branch: Branch
    variables: dict[str, Any]
    classifier: dict[str, jax.Array]
    tap: str

    def logits(self, x) -> jax.Array:
        """The classifier's answers in evaluation: x, floating [B, H, W, C] → [B, classes]."""
        vector = self.branch.apply(self.variables, x, taps=(self.tap,), train=False)[self.tap].vector
        return vector @ self.classifier["kernel"] + self.classifier["bias"][None]


def load_mobilenet_v1(path: str | os.PathLike | BinaryIO, *, width: float = 1.0, classes: int = 1001, **options) -> Pretrained:
    """MobileNetV1 as TensorFlow trained it, from an .npz of TFLite's tensors, whose batch norms are folded into biases.

    Howard et al. 2017, arXiv:1704.04861. The network sees RGB / 127.5 − 1; published figures are those of the central 87.5 %
    of an image, resized to 224×224. Class 0 is the background, then come ImageNet's in the order of their wnids.

    Args:
        path: of the file, or an open one; its names are `MobilenetV1.Conv2d_0.weights` and so on, kernels are OHWI,
            depthwise ones 1HWC.
        width: multiplier of the channels.
        classes: of the classifier, the background included.
        **options: attributes of `MobileNetV1`, such as `dtype` and `impl`.

    Raises:
        InputError: what `read_tensors` and `fill` raise.

    Example:
        >>> net = load_mobilenet_v1("mobilenet_v1_0.25_224.npz", width=0.25)  # doctest: +SKIP
        >>> jax.jit(net.logits)(images / 127.5 - 1).argmax(1)  # doctest: +SKIP
        Array([285, ...], dtype=int32)
        >>> import io
        >>> file = io.BytesIO()
        >>> np.savez(file, image=np.zeros(3))
        >>> load_mobilenet_v1(io.BytesIO(file.getvalue()), width=0.25)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        mgjax.errors.InputError: ... mobilenet_v1 of width 0.25: nothing was loaded. 56 missing: ... 1 unexpected: 'image' (3,)
    """
    folded = dict(norm="none", use_bias=True, padding="SAME")
    branch = MobileNetV1.named("mobilenet_v1", width=width, **{**folded, **options})
    return _load(path, f"mobilenet_v1 of width {width:g}", branch, classes, mobilenet_v1_rules(branch))


def mobilenet_v1_rules(branch: MobileNetV1) -> tuple[Rule, ...]:
    """Of the tensors that `load_mobilenet_v1` reads.

    Example:
        >>> [rule.path for rule in mobilenet_v1_rules(MobileNetV1())][:2]
        ['branch/params/stem/conv/kernel', 'branch/params/stem/conv/bias']
    """

    def layer(weights: str, bias: str, path: str, axes: str) -> tuple[Rule, Rule]:
        return Rule(rf"MobilenetV1\.{weights}", f"{path}/kernel", axes), Rule(rf"MobilenetV1\.{bias}", f"{path}/bias")

    blocks = [
        f"branch/params/stage{stage + 1}_block{block + 1}"
        for stage, count in enumerate(per_stage(branch.blocks, branch.widths))
        for block in range(count)
    ]
    rules = [*layer(r"Conv2d_0\.weights", r"MobilenetV1\.Conv2d_0\.Conv2D_bias", "branch/params/stem/conv", "ohwi->hwio")]
    for number, block in enumerate(blocks, 1):
        name = f"Conv2d_{number}_depthwise"
        bias = rf"MobilenetV1\.{name}\.depthwise_bias"
        rules += layer(rf"{name}\.depthwise_weights", bias, f"{block}/depthwise", "mhwc->hwmc")
        name = f"Conv2d_{number}_pointwise"
        rules += layer(rf"{name}\.weights", rf"MobilenetV1\.{name}\.Conv2D_bias", f"{block}/pointwise/dense", "ohwi->io")
    name = r"Logits\.Conv2d_1c_1x1"
    return (*rules, *layer(rf"{name}\.weights", rf"{name}\.Conv2D_bias", "classifier", "ohwi->io"))


def _load(path: str | os.PathLike | BinaryIO, what: str, branch: Branch, classes: int, rules: Sequence[Rule]) -> Pretrained:
    tap = list(branch.feature_info)[-1]
    channels = branch.feature_info[tap].channels
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: branch.init(jax.random.key(0), x, taps=(tap,), train=False), image)
    classifier = {
        "kernel": jax.ShapeDtypeStruct((channels, classes), jnp.float32),
        "bias": jax.ShapeDtypeStruct((classes,), jnp.float32),
    }
    like = {"branch": variables, "classifier": classifier}
    filled = fill(read_tensors(path), rules, like, source=f"'{path}' as {what}")
    return Pretrained(branch, filled["branch"], filled["classifier"], tap)


def read_tensors(path: str | os.PathLike | BinaryIO) -> dict[str, np.ndarray]:
    """Name → array, of an .npz file. Nothing in it is executed.

    Args:
        path: of the file, or an open one.

    Raises:
        InputError: no such file, no .npz, a damaged one, or one that holds something else than arrays of numbers.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> np.savez(file, a=np.zeros((2, 3)))
        >>> read_tensors(io.BytesIO(file.getvalue()))["a"].shape
        (2, 3)
    """
    tensors: dict[str, np.ndarray] = {}
    name = ""
    try:
        with contextlib.nullcontext(path) if hasattr(path, "read") else open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputError(f"'{path}' is no .npz file, or not the whole of one")
            file.seek(0)
            opened = np.load(file, allow_pickle=False)
            for name in opened.files:
                tensors[name] = opened[name]
                if not isinstance(tensors[name], np.ndarray):
                    raise InputError(f"'{path}' holds '{name}', which is no array")
    except InputError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        at = f", at '{name}'" if name else ""
        raise InputError(f"'{path}' cannot be read as an .npz file of arrays{at}: {error}") from None
    return tensors


def fill(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], like: Mapping, *, source: str) -> dict[str, Any]:
    r"""The leaves of `like` with the values of `tensors`: all of them, or an error that tells of all that does not fit.

    Args:
        tensors: name → array.
        rules: a tensor goes where the one rule says that matches its name.
        like: nested dict of arrays or `jax.ShapeDtypeStruct`s.
        source: what the tensors are, for messages.

    Returns:
        A dict as `like`, of jax arrays with its shapes and dtypes.

    Raises:
        InputError: leaves that no tensor fills, tensors that no rule knows, two for one leaf, other shapes, or values that
            are not finite floating numbers. One message lists them, at most `SHOWN` of a kind.
        ValueError: a tensor that more than one rule knows.

    Example:
        >>> like = {"dense": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
        >>> rules = [Rule(r"fc\.weight", "dense/kernel", "oi->io")]
        >>> fill({"fc.weight": np.ones((2, 3))}, rules, like, source="toy")["dense"]["kernel"].shape
        (3, 2)
        >>> fill({"fc.weight": np.ones((2, 4)), "fc.bias": np.ones(2)}, rules, like, source="toy")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        mgjax.errors.InputError: toy: nothing was loaded. 1 unexpected: 'fc.bias' (2,). 1 unfit: 'fc.weight' (2, 4) becomes...
    """
    wanted = flatten_dict(like, sep="/")
    claimed: dict[str, str] = {}  # leaf → the tensor that is it
    values: dict[str, np.ndarray] = {}
    unexpected, unfit = [], []
    for name, tensor in tensors.items():
        found = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        if len(found) > 1:
            raise ValueError(f"'{name}' is known to {len(found)} rules: {[rule.pattern for rule, _ in found]}")
        if not found:
            unexpected.append(f"'{name}' {tensor.shape}")
            continue
        rule, match = found[0]
        if rule.path is None:
            continue
        path = match.expand(rule.path)
        if path not in wanted:
            unexpected.append(f"'{name}' {tensor.shape}, for a '{path}' that the network does not have")
        elif path in claimed:
            unfit.append(f"'{name}' is '{path}', as '{claimed[path]}' is")
        else:
            claimed[path] = name
            values[path], why = _arranged(tensor, rule.axes, wanted[path].shape)
            if why:
                unfit.append(f"'{name}' {tensor.shape} {why} for '{path}' {wanted[path].shape}")
    patterns = {rule.path: rule.pattern.replace("\\", "") for rule in rules}
    missing = [
        f"'{patterns.get(path, 'a tensor')}' for '{path}' {leaf.shape}" for path, leaf in wanted.items() if path not in claimed
    ]
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:SHOWN])}{', …' if len(found) > SHOWN else ''}"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("unfit", unfit))
        if found
    ]
    if problems:
        raise InputError(f"{source}: nothing was loaded. {'. '.join(problems)}")
    return unflatten_dict({path: jnp.asarray(values[path], leaf.dtype) for path, leaf in wanted.items()}, sep="/")


def _arranged(tensor: np.ndarray, axes: str, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """A tensor with our axes, and why it cannot be a leaf of that shape ("" if it can)."""
    if not np.issubdtype(tensor.dtype, np.floating):
        return tensor, f"is {tensor.dtype}, not floating,"
    if axes:
        theirs, ours = axes.split("->")
        if tensor.ndim != len(theirs) or any(n != 1 for n, axis in zip(tensor.shape, theirs) if axis not in ours):
            return tensor, f"is not {axes}"
        tensor = np.einsum(axes, tensor)  # a sum over one position
    if tensor.shape != shape:
        return tensor, f"becomes {tensor.shape}" if axes else "does not fit"
    return tensor, "" if np.isfinite(tensor).all() else "holds values that are not finite"
