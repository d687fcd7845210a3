"""Floating-point operations of a function, counted from its jaxpr."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.extend import core

_ELEMENTWISE = frozenset(
    "add sub mul div max min pow integer_pow exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt "
    "sin cos tan erf erfc erf_inv neg abs add_any square".split()
)
_REDUCE = frozenset("reduce_sum reduce_max reduce_min reduce_prod cumsum cumprod cummax cummin cumlogsumexp".split())
_DEPTHWISE = ("depthwise_convolve", "depthwise_input_gradient", "depthwise_kernel_gradient")


class Flops(NamedTuple):
    """FLOPs, not multiply-adds: one multiply-add is two.

    Attributes:
        matmul: of dot products and convolutions; what hardware peaks are quoted for.
        elementwise: one per element of floating arithmetic, one per element that is reduced.
    """

    matmul: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.elementwise


def count_flops(fn, *args, **kwargs) -> Flops:
    """Counts the FLOPs of `fn(*args, **kwargs)` without running it.

    Loops count as often as they run (`while`, whose count is not known, once), conditionals as
    their dearest branch. What XLA later removes or recomputes is not seen.

    Args:
        fn: any traceable function; arguments may be `jax.ShapeDtypeStruct`s.

    Example:
        >>> import jax.numpy as jnp
        >>> count_flops(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4))).matmul
        48
    """
    return count_jaxpr(jax.make_jaxpr(lambda a, k: fn(*a, **k))(args, kwargs).jaxpr)


def count_jaxpr(jaxpr) -> Flops:
    """As `count_flops`, of a jaxpr that is there already."""
    matmul = elementwise = 0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        inner = [count_jaxpr(j) for j in _subjaxprs(eqn.params)]
        if name == "cond":
            inner = [max(inner, key=lambda f: f.total)]
        times = eqn.params["length"] if name == "scan" else 1
        matmul += times * sum(f.matmul for f in inner)
        elementwise += times * sum(f.elementwise for f in inner)
        if name == "dot_general":
            (lhs_contract, _), _ = eqn.params["dimension_numbers"]
            matmul += 2 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in lhs_contract)
        elif name == "conv_general_dilated":
            spec, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
            taps = math.prod(kernel[d] for d in spec.rhs_spec[1:])  # input features per group and window
            # Zeros that a transposed convolution puts between the inputs are not computed.
            matmul += 2 * math.prod(out.shape) * taps // math.prod(eqn.params["lhs_dilation"])
        elif name in _DEPTHWISE:
            # Of mgjax.ops.depthwise: the window's taps for every number of the output, forward and in both gradients.
            output = (out, eqn.invars[0].aval, eqn.invars[1].aval)[_DEPTHWISE.index(name)]
            matmul += 2 * math.prod(output.shape) * math.prod(eqn.params["geometry"].window)
        elif name in _ELEMENTWISE and _floating(out):
            elementwise += math.prod(out.shape)
        elif name in _REDUCE and _floating(out):
            elementwise += math.prod(eqn.invars[0].aval.shape)
    return Flops(matmul, elementwise)


def _floating(aval) -> bool:
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.floating)


def _subjaxprs(params):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
