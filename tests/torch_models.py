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


def torch_convnext(blocks: Sequence[int], widths: Sequence[int], patch: int, halvings: int):
    """ConvNeXt with the modules and names of torchvision's, without stochastic depth and the last dense layer.

    `features` has the stem, the stages, and between two of them a norm and a convolution; after `halvings` of those, which
    have stride and kernel 2, they have 1.
    """
    import torch
    from torch import nn

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Permute(nn.Module):
        def __init__(self, *axes):
            super().__init__()
            self.axes = axes

        def forward(self, x):
            return x.permute(self.axes)

    class CNBlock(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.block = nn.Sequential(
                nn.Conv2d(width, width, 7, padding=3, groups=width), Permute(0, 2, 3, 1), nn.LayerNorm(width, eps=1e-6),
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), Permute(0, 3, 1, 2),
            )  # fmt: skip
            self.layer_scale = nn.Parameter(0.5 + torch.rand(width, 1, 1))

        def forward(self, x):
            return x + self.layer_scale * self.block(x)

    layers = [nn.Sequential(nn.Conv2d(3, widths[0], patch, stride=patch), LayerNorm2d(widths[0], eps=1e-6))]
    for i, (count, width) in enumerate(zip(blocks, widths)):
        if i:
            step = 2 if i <= halvings else 1
            layers.append(
                nn.Sequential(LayerNorm2d(widths[i - 1], eps=1e-6), nn.Conv2d(widths[i - 1], width, step, stride=step))
            )
        layers.append(nn.Sequential(*(CNBlock(width) for _ in range(count))))
    model = nn.Sequential()
    model.features = nn.Sequential(*layers)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(LayerNorm2d(widths[-1], eps=1e-6), nn.Flatten(1))
    return model


_CN = r"features\.(\d+)\.(\d+)\."
_cn_block = lambda layer, block: f"stage{(layer + 1) // 2}_block{block + 1}"
_CN_BETWEEN = r"features\.([2468])\."
_cn_stage = lambda layer: f"stage{layer // 2 + 1}"
CONVNEXT_RULES = (
    Rule(r"features\.0\.0\.weight", "params/stem/kernel", conv),
    Rule(r"features\.0\.0\.bias", "params/stem/bias"),
    Rule(r"features\.0\.1\.(weight|bias)", lambda leaf: norm_path("stem_norm", leaf)),
    Rule(_CN_BETWEEN + r"0\.(weight|bias)", lambda i, leaf: norm_path(f"{_cn_stage(i)}_norm", leaf)),
    Rule(_CN_BETWEEN + r"1\.weight", lambda i: f"params/{_cn_stage(i)}_embed/kernel", conv),
    Rule(_CN_BETWEEN + r"1\.bias", lambda i: f"params/{_cn_stage(i)}_embed/bias"),
    Rule(_CN + r"layer_scale", lambda i, j: f"params/{_cn_block(i, j)}/scale", lambda leaf: leaf[:, 0, 0]),
    Rule(_CN + r"block\.0\.weight", lambda i, j: f"params/{_cn_block(i, j)}/depthwise/kernel", conv),
    Rule(_CN + r"block\.0\.bias", lambda i, j: f"params/{_cn_block(i, j)}/depthwise/bias"),
    Rule(_CN + r"block\.2\.(weight|bias)", lambda i, j, leaf: norm_path(f"{_cn_block(i, j)}/norm", leaf)),
    Rule(_CN + r"block\.([35])\.weight", lambda i, j, k: f"params/{_cn_block(i, j)}/mlp/dense{k // 2}/kernel", dense),
    Rule(_CN + r"block\.([35])\.bias", lambda i, j, k: f"params/{_cn_block(i, j)}/mlp/dense{k // 2}/bias"),
    Rule(r"classifier\.0\.(weight|bias)", lambda leaf: norm_path("norm", leaf)),
)


def torch_xception(stem_stride: int, stem_padding: int, last_stride: int):
    """Xception as Keras defines it, without its last dense layer: `stem1`, `stem2`, `blocks` and `exit1`, `exit2`.

    `last_stride` is that of the last of the 12 blocks.
    """
    from torch import nn
    from torch.nn.functional import max_pool2d, pad, relu

    norm = lambda width: nn.BatchNorm2d(width, eps=1e-3)

    def separable(before, after):
        depthwise = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
        return nn.Sequential(depthwise, nn.Conv2d(before, after, 1, bias=False), norm(after))

    def pool(x):  # TensorFlow's "SAME": what is left over is padded behind
        total = [(-(-n // 2) - 1) * 2 + 3 - n for n in (x.shape[3], x.shape[2])]
        return max_pool2d(pad(x, [side for t in total for side in (t // 2, t - t // 2)], value=-float("inf")), 3, 2)

    class Block(nn.Module):
        def __init__(self, before, widths, stride, first):
            super().__init__()
            self.stride, self.first = stride, first
            self.separable = nn.ModuleList(separable(a, b) for a, b in zip((before, *widths), widths))
            self.shortcut = None
            if (before, 1) != (widths[-1], stride):
                self.shortcut = nn.Sequential(nn.Conv2d(before, widths[-1], 1, stride, bias=False), norm(widths[-1]))

        def forward(self, x):
            y = x
            for i, layer in enumerate(self.separable):
                y = layer(y if self.first and i == 0 else relu(y))
            return (pool(y) if self.stride == 2 else y) + (self.shortcut(x) if self.shortcut else x)

    blocks = [Block(64, (128, 128), 2, True), Block(128, (256, 256), 2, False), Block(256, (728, 728), 2, False)]
    blocks += [Block(728, (728,) * 3, 1, False) for _ in range(8)]
    blocks.append(Block(728, (728, 1024), last_stride, False))
    model = nn.Sequential()
    model.stem1 = nn.Sequential(nn.Conv2d(3, 32, 3, stem_stride, stem_padding, bias=False), norm(32), nn.ReLU())
    model.stem2 = nn.Sequential(nn.Conv2d(32, 64, 3, 1, stem_padding, bias=False), norm(64), nn.ReLU())
    model.blocks = nn.Sequential(*blocks)
    model.exit1 = nn.Sequential(*separable(1024, 1536), nn.ReLU())
    model.exit2 = nn.Sequential(*separable(1536, 2048), nn.ReLU())
    return model


def _xception_block(i: int) -> str:
    """Our name of the block of that number: three of the entry flow, eight of the middle, one of the exit."""
    return f"stage{i + 1}_block1" if i < 3 else f"stage3_block{i - 1}" if i < 11 else "stage4_block1"


_pointwise = lambda leaf: leaf[:, :, 0, 0].T
_SEPARABLE = r"blocks\.(\d+)\.separable\.(\d+)\."
_separable = lambda i, j: f"{_xception_block(i)}/separable{j + 1}"
XCEPTION_RULES = (
    Rule(r"stem(\d)\.0\.weight", lambda i: f"params/stem{i}/conv/kernel", conv),
    Rule(rf"stem(\d)\.1\.{_NORM}", lambda i, leaf: norm_path(f"stem{i}/norm", leaf)),
    Rule(_SEPARABLE + r"0\.weight", lambda i, j: f"params/{_separable(i, j)}/depthwise/kernel", conv),
    Rule(_SEPARABLE + r"1\.weight", lambda i, j: f"params/{_separable(i, j)}/pointwise/dense/kernel", _pointwise),
    Rule(_SEPARABLE + rf"2\.{_NORM}", lambda i, j, leaf: norm_path(f"{_separable(i, j)}/pointwise/norm", leaf)),
    Rule(r"blocks\.(\d+)\.shortcut\.0\.weight", lambda i: f"params/{_xception_block(i)}/shortcut/conv/kernel", conv),
    Rule(rf"blocks\.(\d+)\.shortcut\.1\.{_NORM}", lambda i, leaf: norm_path(f"{_xception_block(i)}/shortcut/norm", leaf)),
    Rule(r"exit(\d)\.0\.weight", lambda i: f"params/exit{i}/depthwise/kernel", conv),
    Rule(r"exit(\d)\.1\.weight", lambda i: f"params/exit{i}/pointwise/dense/kernel", _pointwise),
    Rule(rf"exit(\d)\.2\.{_NORM}", lambda i, leaf: norm_path(f"exit{i}/pointwise/norm", leaf)),
    COUNTER,
)


def torch_mobilenet(branch):
    """MobileNetV2 with the modules and names of torchvision's, MobileNetV1 in their style, without the last dense layer.

    `features` has the stem, the blocks and the head.

    Args:
        branch: a `MobileNetV1` or `MobileNetV2`, whose numbers it has.
    """
    from torch import nn

    def unit(before, after, kernel, stride=1, groups=1):
        convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU6())

    class InvertedResidual(nn.Module):
        def __init__(self, before, after, stride, expansion):
            super().__init__()
            wide = before * expansion
            layers = [unit(before, wide, 1)] if expansion != 1 else []
            layers += [unit(wide, wide, 3, stride, wide), nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)]
            self.conv, self.residual = nn.Sequential(*layers), stride == 1 and before == after

        def forward(self, x):
            return x + self.conv(x) if self.residual else self.conv(x)

    layers, width = [unit(3, branch.stem_width, 3, branch.stem_stride)], branch.stem_width
    expansions = getattr(branch, "expansions", (None,) * len(branch.widths))
    for after, count, stride, expansion in zip(branch.widths, branch.blocks, branch.strides, expansions):
        for j in range(count):
            step = 1 if j else stride
            if expansion is None:
                layers.append(nn.Sequential(unit(width, width, 3, step, width), unit(width, after, 1)))
            else:
                layers.append(InvertedResidual(width, after, step, expansion))
            width = after
    if head := getattr(branch, "head_width", None):
        layers.append(unit(width, head, 1))
    model = nn.Sequential()
    model.features = nn.Sequential(*layers)
    return model


def mobilenet_rules(branch) -> tuple[Rule, ...]:
    """Of `torch_mobilenet(branch)`."""
    pointwise = lambda leaf: leaf[:, :, 0, 0].T

    def unit(pattern, path, leaf, change, norm=1):
        weight = Rule(rf"features\.{pattern}{norm - 1}\.weight", f"params/{path}{leaf}/kernel", change)
        return weight, Rule(rf"features\.{pattern}{norm}\.{_NORM}", lambda name: norm_path(f"{path}norm", name))

    rules, index = [*unit(r"0\.", "stem/", "conv", conv), COUNTER], 1
    expansions = getattr(branch, "expansions", (None,) * len(branch.widths))
    for stage, (count, expansion) in enumerate(zip(branch.blocks, expansions)):
        for block in range(count):
            path = f"stage{stage + 1}_block{block + 1}/"
            if expansion is None:
                rules += unit(rf"{index}\.0\.", path, "depthwise", conv)
                rules += unit(rf"{index}\.1\.", f"{path}pointwise/", "dense", pointwise)
            else:
                first = int(expansion != 1)
                if first:
                    rules += unit(rf"{index}\.conv\.0\.", f"{path}expand/", "dense", pointwise)
                rules += unit(rf"{index}\.conv\.{first}\.", path, "depthwise", conv)
                rules += unit(rf"{index}\.conv\.", f"{path}project/", "dense", pointwise, first + 2)
            index += 1
    if getattr(branch, "head_width", None):
        rules += unit(rf"{index}\.", "head/", "dense", pointwise)
    return tuple(rules)
