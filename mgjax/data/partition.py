"""Partition of the training examples among granularities: a declaration and a source become a weight for every example."""

from __future__ import annotations

import difflib
import pathlib

import cv2
import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2

from mgjax.data.sources import ArraySource, DataError, EncodedSource, Source, Subset, Unlabelled
from mgjax.granularity import Cluster, Column, Everyone, Granularity, Members, Resolution, Subtree
from mgjax.taxonomy import UNKNOWN, Taxonomy

_CHUNK = 1024  # examples that are read at a time
_SIDE = 8  # pixels along a side of the images that are clustered
_ITERATIONS = 50


def membership(granularity: Granularity, source: Source, taxonomy: Taxonomy) -> np.ndarray | None:
    """How much each example counts in what a granularity learns.

    One that is no member counts 0, and members count 1. Of a granularity weighted by "class" each class counts as much
    as any other: with n_c of the n labelled members in class c of C at the finest level, an example counts n / (C · n_c);
    members whose label is unknown there count 1. Either way the mean over the members is 1.

    Images are decoded only to be clustered; else labels, columns and the headers of files tell who is a member. Clusters are
    those of k-means, whose first centres are drawn by k-means++ (Arthur & Vassilvitskii 2007).

    Args:
        granularity: its `members` and `weighted_by`; "loss" is as "none", since what it makes of examples changes in training.
        source: the training examples, as they are trained on.
        taxonomy: of their labels.

    Returns:
        float32 [len(source)], for `train_batches`; None where all count alike.

    Raises:
        DataError: no example is a member; a label, column, feature vector or size of image that the declaration asks for
            is not there.
        TaxonomyError: a level that the taxonomy does not have, a label outside it.

    Example:
        >>> tree = Taxonomy.from_names({"super": ["fish", "bird"], "sub": ["eel", "cod", "owl"]}, {"sub": [0, 0, 1]})
        >>> source = ArraySource({"sub": np.array([0, 2, 1, 0])})
        >>> fish = Granularity("fish", "trunk", "stage1", members=Subtree("super", ("fish",)))
        >>> membership(fish, source, tree).tolist()
        [1.0, 0.0, 1.0, 1.0]
    """
    members, by_class = granularity.members, granularity.weighted_by == "class"
    if isinstance(members, Everyone) and not by_class:
        return None
    try:
        weights = _members(members, source, taxonomy).astype(np.float32)
        labels = _labels(source, taxonomy, taxonomy.levels[-1]) if by_class else None
    except DataError as error:
        raise DataError(f"granularity '{granularity.name}': {error}") from None
    if not weights.any():
        raise DataError(
            f"granularity '{granularity.name}' learns from no example of {source.name}: none is a member of {members}"
        )
    if labels is not None:
        counted = (weights > 0) & (labels != UNKNOWN)
        count = np.bincount(labels[counted])
        weights[counted] = counted.sum() / ((count > 0).sum() * count[labels[counted]])
    return weights


def _members(members: Members, source: Source, taxonomy: Taxonomy) -> np.ndarray:
    """bool [len(source)]."""
    match members:
        case Everyone():
            return np.ones(len(source), bool)
        case Subtree(level, names):
            known = list(taxonomy.names[taxonomy.index(level)])
            for name in names:
                if name not in known:
                    near = ", ".join(f"'{n}'" for n in difflib.get_close_matches(name, known, 3, 0.0))
                    raise DataError(f"there is no '{name}' at level '{level}'; the nearest are {near}")
            return np.isin(_labels(source, taxonomy, level), [known.index(name) for name in names])
        case Column(key, values):
            held = _column(source, key, np.arange(len(source)))
            if held is None or held.ndim != 1:
                what = "has no column" if held is None else f"holds arrays of shape {held.shape[1:]} in"
                raise DataError(f"{source.name} {what} '{key}', by which its members are chosen")
            return np.any([_equal(held, value) for value in values], axis=0) if values else np.zeros(len(held), bool)
        case Cluster():
            return _cluster(members, source)
        case Resolution(low, high):
            sides = _sides(source, np.arange(len(source)))
            return (low <= sides) & (sides < high)
    raise DataError(f"{members!r} says nothing of who is a member: one of Everyone, Subtree, Column, Cluster, Resolution")


def _labels(source: Source, taxonomy: Taxonomy, level: str) -> np.ndarray:
    """int32 [len(source)]; the label at `level`, or, where it is unknown, the ancestor of a finer one."""
    result = np.full(len(source), UNKNOWN, np.int32)
    for finer in taxonomy.levels[taxonomy.index(level) :]:
        held = _column(source, finer, np.arange(len(source)))
        if held is not None:
            result = np.where(result == UNKNOWN, taxonomy.lift(held, finer, level), result)
            if (result != UNKNOWN).all():
                break
        elif finer == taxonomy.levels[-1] and (result == UNKNOWN).all():
            raise DataError(f"{source.name} has no labels of level '{level}' or a finer one")
    return result


def _equal(held: np.ndarray, value: str | int | float | bool) -> np.ndarray:
    """bool [examples]; a number equals a cell of text that spells it, whatever its form."""
    if held.dtype.kind not in "OSUT":
        if isinstance(value, str):
            raise DataError(f"a column of numbers ({held.dtype}) holds no '{value}': name numbers")
        return held == value
    texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in held.tolist()]
    if isinstance(value, str):
        return np.array([text == value for text in texts], bool)
    return np.array([_number(text) == value for text in texts], bool)


def _number(text: str) -> float | None:
    try:
        return {"true": 1.0, "false": 0.0}.get(text.strip().lower()) if text.strip().isalpha() else float(text)
    except ValueError:
        return None


def _column(source: Source, key: str, indices: np.ndarray) -> np.ndarray | None:
    """What examples hold under a key, [len(indices), …], by the shortest way; None where they hold no such thing."""
    match source:
        case Subset():
            return _column(source.source, key, source.indices[indices])
        case Unlabelled():
            held = _column(source.source, key, indices)
            return held if held is None or key != source.level else source.hide(held, indices)
        case ArraySource():
            if key in source.arrays:
                return source.arrays[key][indices]
            return None if source.origin is None else _column(source.origin, key, indices)
        case EncodedSource():
            return source.column(key, indices)
    parts = []
    for start in range(0, len(indices), _CHUNK):
        example = source.take(indices[start : start + _CHUNK])
        if key not in example:
            return None
        parts.append(example[key])
    return np.concatenate(parts)


def _sides(source: Source, indices: np.ndarray) -> np.ndarray:
    """int64 [len(indices)]; pixels of the shorter side of the images as they were stored."""
    match source:
        case Subset():
            return _sides(source.source, source.indices[indices])
        case Unlabelled():
            return _sides(source.source, indices)
        case ArraySource() if source.origin is not None:
            return _sides(source.origin, indices)
        case EncodedSource():
            return source.sides(indices)
    image = source.take(indices[:1]).get("image")
    if image is None or image.ndim < 3:
        raise DataError(f"{source.name} does not tell how large its images were: members cannot be chosen by resolution")
    return np.full(len(indices), min(image.shape[1:3]), np.int64)


def _cluster(members: Cluster, source: Source) -> np.ndarray:
    """bool [len(source)]; the examples of one cluster."""
    features, valid = _features(members.of, source) if members.of else _inputs(source)
    known = features[valid]
    too_few = DataError(f"the {len(known)} examples of {source.name} do not fall into {members.count} clusters: ask for fewer")
    if len(np.unique(known[:: max(1, len(known) // _CHUNK)], axis=0)) < members.count:  # mostly enough, and soon done
        if len(np.unique(known, axis=0)) < members.count:
            raise too_few
    known = known - known.mean(0, keepdims=True)  # small numbers lose less
    try:
        draw = np.random.default_rng(members.seed)
        _, of = kmeans2(known, members.count, iter=_ITERATIONS, minit="++", missing="raise", seed=draw)
    except ClusterError:
        raise too_few from None
    sizes, first = np.bincount(of, minlength=members.count), [np.argmax(of == c) for c in range(members.count)]
    chosen = np.lexsort((first, -sizes))[members.index]  # of two as large, the one that comes first
    result = np.zeros(len(source), bool)
    result[valid] = of == chosen
    return result


def _features(path: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [len(source), D], which of them are good) from a file."""
    try:
        features = np.load(pathlib.Path(path).expanduser())
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the feature vectors in '{path}' cannot be read ({error}): save an array by numpy.save") from None
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind not in "fiu":
        raise DataError(f"'{path}' holds no array of numbers [examples, D]")
    if len(features) != len(source):
        raise DataError(f"'{path}' holds feature vectors of {len(features)} examples, but {source.name} has {len(source)}")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise DataError(f"'{path}' holds feature vectors that are not finite")
    return features, np.ones(len(features), bool)


def _inputs(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [len(source), D], which of them could be read): small images, or whatever else the inputs are."""
    parts, valid = [], []
    for start in range(0, len(source), _CHUNK):
        example = source.take(np.arange(start, min(start + _CHUNK, len(source))))
        if "image" not in example:
            raise DataError(f"{source.name} holds no images to cluster: name a file of feature vectors in Cluster.of")
        inputs = example["image"]
        if inputs.ndim == 4:
            height, width = (min(_SIDE, side) for side in inputs.shape[1:3])
            inputs = np.stack([cv2.resize(np.float32(i), (width, height), interpolation=cv2.INTER_AREA) for i in inputs])
        parts.append(np.float32(inputs).reshape(len(inputs), -1))
        valid.append(example["valid"])
    return np.concatenate(parts), np.concatenate(valid)
