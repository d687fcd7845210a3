"""Torch counterparts of the published branches, and how their parameters map to ours, leaf by leaf.

Torch is imported inside the functions that build models: the maps alone need none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# ---------------------------------------------------------------------- leaf by leaf


class Rule(NamedTuple):
    """Where the leaves come to lie whose whole name matches `pattern`.

    Attributes:
        pattern: regular expression.
        path: our path, or a function of the match's groups (numbers as int) that gives it; None
            for a leaf that we leave out on purpose.
        change: from torch's layout to ours.
    """

    pattern: str
    path: str | Callable[..., str] | None
    change: Callable[[np.ndarray], np.ndarray] = lambda leaf: leaf


def conv(leaf):  # [out, in, height, width]
    return leaf.transpose(2, 3, 1, 0)


def dense(leaf):  # [out, in]
    return leaf.T


def convert(state: Mapping[str, np.ndarray], rules: Sequence[Rule], like: Mapping) -> dict:
    """Our variables with the values of a torch state.

    Every leaf of the state is matched by one rule, every leaf of `like` is filled once with a
    value of its shape; a ValueError tells of all that does not fit.
    """
    wanted = {path: leaf.shape for path, leaf in flatten_dict(like, sep="/").items()}
    filled, wrong = {}, []
    for name, leaf in state.items():
        matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        if len(matches) != 1:
            wrong.append(f"'{name}' is matched by {len(matches)} rules")
            continue
        rule, match = matches[0]
        if rule.path is None:
            continue
        groups = [int(g) if g and g.isdigit() else g for g in match.groups()]
        path = rule.path(*groups) if callable(rule.path) else rule.path
        value = rule.change(leaf)
        if path not in wanted:
            wrong.append(f"'{name}' goes to '{path}', which is not there")
        elif path in filled:
            wrong.append(f"'{name}' goes to '{path}', which is filled already")
        elif value.shape != wanted[path]:
            wrong.append(f"'{name}' of {value.shape} does not fit '{path}' of {wanted[path]}")
        filled[path] = value
    wrong += [f"'{path}' is not filled" for path in wanted if path not in filled]
    if wrong:
        raise ValueError("; ".join(wrong))
    return unflatten_dict(filled, sep="/")


NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def norm_path(module: str, leaf: str) -> str:
    """Our path of a leaf of `mgjax.layers.Norm`."""
    return f"{'batch_stats' if leaf.startswith('running') else 'params'}/{module}/norm/{NORM_LEAVES[leaf]}"


_NORM = r"(weight|bias|running_mean|running_var)"
COUNTER = Rule(r".*num_batches_tracked", None)

# Hugging Face `ResNetModel`.
_BLOCK = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
_block = lambda stage, block: f"stage{stage + 1}_block{block + 1}"
RESNET_RULES = (
    Rule(r"embedder\.embedder\.convolution\.weight", "params/stem/conv/kernel", conv),
    Rule(rf"embedder\.embedder\.normalization\.{_NORM}", lambda leaf: norm_path("stem/norm", leaf)),
    Rule(_BLOCK + r"layer\.(\d+)\.convolution\.weight", lambda s, b, i: f"params/{_block(s, b)}/conv{i + 1}/conv/kernel", conv),
    Rule(
        _BLOCK + rf"layer\.(\d+)\.normalization\.{_NORM}",
        lambda s, b, i, leaf: norm_path(f"{_block(s, b)}/conv{i + 1}/norm", leaf),
    ),
    Rule(_BLOCK + r"shortcut\.convolution\.weight", lambda s, b: f"params/{_block(s, b)}/shortcut/conv/kernel", conv),
    Rule(_BLOCK + rf"shortcut\.normalization\.{_NORM}", lambda s, b, leaf: norm_path(f"{_block(s, b)}/shortcut/norm", leaf)),
    COUNTER,
)

# Hugging Face `ViTModel`, of this and of older versions.
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."


def _vit_dense(pattern: str, ours: str) -> tuple[Rule, Rule]:
    path = lambda leaf: lambda i: f"params/block{i + 1}/{ours}/{leaf}"
    return Rule(_LAYER + pattern + r"\.weight", path("kernel"), dense), Rule(_LAYER + pattern + r"\.bias", path("bias"))


VIT_RULES = (
    Rule(r"embeddings\.cls_token", "params/cls"),
    Rule(r"embeddings\.position_embeddings", "params/position"),
    Rule(r"embeddings\.patch_embeddings\.projection\.weight", "params/embed/kernel", conv),
    Rule(r"embeddings\.patch_embeddings\.projection\.bias", "params/embed/bias"),
    *_vit_dense(r"attention\.(?:q_proj|attention\.query)", "attention/query"),
    *_vit_dense(r"attention\.(?:k_proj|attention\.key)", "attention/key"),
    *_vit_dense(r"attention\.(?:v_proj|attention\.value)", "attention/value"),
    *_vit_dense(r"attention\.(?:o_proj|output\.dense)", "attention/out"),
    *_vit_dense(r"(?:mlp\.fc1|intermediate\.dense)", "mlp/dense1"),
    *_vit_dense(r"(?:mlp\.fc2|output\.dense)", "mlp/dense2"),
    Rule(_LAYER + r"layernorm_before\.(weight|bias)", lambda i, leaf: norm_path(f"block{i + 1}/norm1", leaf)),
    Rule(_LAYER + r"layernorm_after\.(weight|bias)", lambda i, leaf: norm_path(f"block{i + 1}/norm2", leaf)),
    Rule(r"layernorm\.(weight|bias)", lambda leaf: norm_path("norm", leaf)),
    Rule(r"pooler\..*", None),
)


def vgg_rules(blocks: Sequence[int], batch_norm: bool, channels: int = 512, grid: int = 7) -> tuple[Rule, ...]:
    """torchvision's `VGG`, whose layers are numbered through, without its last dense layer."""
    rules, index = [], 0
    for stage, count in enumerate(blocks):
        for i in range(count):
            name = f"stage{stage + 1}_conv{i + 1}"
            rules.append(Rule(rf"features\.{index}\.weight", f"params/{name}/conv/kernel", conv))
            rules.append(Rule(rf"features\.{index}\.bias", f"params/{name}/conv/bias"))
            if batch_norm:
                path = lambda leaf, name=name: norm_path(f"{name}/norm", leaf)
                rules.append(Rule(rf"features\.{index + 1}\.{_NORM}", path))
            index += 3 if batch_norm else 2
        index += 1  # the pooling
    # Torch flattens channels first.
    first = lambda leaf: leaf.reshape(-1, channels, grid, grid).transpose(2, 3, 1, 0).reshape(-1, leaf.shape[0])
    rules += [
        Rule(r"classifier\.0\.weight", "params/fc1/kernel", first),
        Rule(r"classifier\.0\.bias", "params/fc1/bias"),
        Rule(r"classifier\.3\.weight", "params/fc2/kernel", dense),
        Rule(r"classifier\.3\.bias", "params/fc2/bias"),
        Rule(r"classifier\.6\..*", None),
        COUNTER,
    ]
    return tuple(rules)


# ---------------------------------------------------------------------- torch models


def randomise(model, images):
    """The model in evaluation, with scales, biases, tokens and positions drawn at random.

    Kernels keep their own random initialisation. Statistics of batches are those of `images`
    ([B, 3, H, W]), moved a little, so that activations stay of order 1 however deep the model is.
    """
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if name.endswith(("bias", "cls_token", "position_embeddings")):
                leaf.normal_(0, 0.1)
            elif leaf.ndim == 1:  # scales of norms
                leaf.uniform_(0.5, 1.5)
        for norm in norms:
            norm.momentum = None  # the mean of what it has seen
        if norms:
            model.train()(images)
        for norm in norms:
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    return model.eval()


def state_of(model) -> dict[str, np.ndarray]:
    """Name → numpy array."""
    return {name: leaf.numpy() for name, leaf in model.state_dict().items()}


def torch_vgg(blocks: Sequence[int], batch_norm: bool, classes: int = 1000):
    """VGG as torchvision defines it: `features`, `avgpool` and `classifier`."""
    import torch
    from torch import nn

    layers, channels = [], 3
    for count, width in zip(blocks, (64, 128, 256, 512, 512)):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            torch.nn.init.kaiming_normal_(layers[-1].weight, mode="fan_in", nonlinearity="relu")
            layers += [nn.BatchNorm2d(width)] * batch_norm + [nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    model = nn.Sequential()
    model.features = nn.Sequential(*layers)
    model.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten())
    model.classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, classes),
    )  # fmt: skip
    return model
