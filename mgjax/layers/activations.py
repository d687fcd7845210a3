"""Activations by name, so that a configuration can choose one."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable

import jax

from mgjax.errors import InputError

ACTIVATIONS: dict[str, Callable] = {
    "elu": jax.nn.elu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "hard_swish": jax.nn.hard_swish,
    "identity": jax.nn.identity,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jax.nn.tanh,
}


def activation(name: str) -> Callable:
    """The function of that name, the same object on every call.

    Args:
        name: one of `ACTIVATIONS`; "gelu" is the exact one (Hendrycks & Gimpel 2016,
            arXiv:1606.08415), "gelu_tanh" its approximation.

    Raises:
        InputError: an unknown name; the message names the nearest.

    Example:
        >>> activation("relu")(-1.0).item()
        0.0
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, 1, cutoff=0.0)[0]
        raise InputError(f"no activation '{name}'; did you mean '{near}'? There are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
