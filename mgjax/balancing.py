"""Balancing: one weight per loss, so that no head learns at the expense of the others.

Every method is a rule that reads the values of the losses and, where it asks for them, the inner products of the losses'
gradients g_i with respect to the features that the heads share: the Gram matrix M = G Gᵀ, M[i, j] = ⟨g_i, g_j⟩. Projections,
min-norm points and equal angles need M alone, and what each method makes of the gradients is a combination Σ_i w_i · g_i, so a
balancer never sees a parameter. That is the view of MGDA-UB (Sener & Koltun 2018, arXiv:1810.04650), here of all methods.

What all members share, and one table tests:

* What is not known (its head is not asked, or knows no label of the batch) has weight 1, keeps its state to the bit and
  alters no other weight. A loss without a gradient at the features, as of a head behind a stop-gradient, counts as not known
  to the methods that read gradients: it would otherwise be the min-norm point, and stop everybody else.
* Weights are constants: nothing is differentiated through them.
* Where a method fixes proportions alone, the weights of what is known sum to its number, so the learning rate means the same
  as with equal weights. What is not so says so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mgjax.contracts import Array
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError


@dataclasses.dataclass(frozen=True)
class Balancer:
    """Base of all methods; by itself all weights are 1.

    Attributes:
        every: steps between two looks at the gradients, for methods that read them; between them the caller uses the last
            weights again. A look costs a backward pass of every loss down to the shared features. The default of those
            methods is 10, which makes that a tenth; Navon et al. 2022 (arXiv:2202.01017) study such reuse. 1 is as published.
        seam: (of the class) True: the method reads `gram`, and its weights scale what flows back into the shared features,
            while the parameters of a head learn from its own loss. False: the weights are of the whole losses.

    Raises:
        DeclarationError: an option out of its range.

    Example:
        >>> losses, known = jnp.array([2.0, 0.5, 0.0]), jnp.array([True, True, False])
        >>> method = balancer("gls")
        >>> weights, state = method(method.init(3), losses, known, None, jax.random.key(0))
        >>> [round(float(w), 4) for w in weights]
        [0.25, 1.0, 1.0]
    """

    every: int = 1
    seam: ClassVar[bool] = False

    def __post_init__(self):
        self._check(self.every >= 1 and self.every == int(self.every), "every", "a number of steps, 1 or more")
        if not self.seam and self.every != 1:
            raise DeclarationError(f"balancing by {type(self).__name__} reads no gradients: leave every at 1, not {self.every}")

    def init(self, count: int) -> dict[str, Array]:
        """The state of so many losses: named float32 arrays [count], of constant structure; empty where there is none."""
        return {}

    def __call__(
        self, state: dict[str, Array], losses: Array, known: Array, gram: Array | None, rng: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The weights of a step.

        Args:
            state: from `init`, or as it was left by the last call.
            losses: floating [T], not negative; anything where not known.
            known: bool [T]; False where a loss does not exist in this batch.
            gram: floating [T, T], inner products of the gradients of `losses` at the shared features; None where `seam` is
                False.
            rng: key, for what is drawn at random.

        Returns:
            (weights, state), all float32 [T]; what is computed between is float64 where losses or gram are.

        Raises:
            InputError: `gram` is missing, or not of the shape of `losses`.
        """
        dtype = jnp.promote_types(losses.dtype, jnp.float32)
        values = jax.lax.stop_gradient(jnp.where(known, losses, 0).astype(dtype))
        taking_part = known
        if self.seam:
            if gram is None or gram.shape != (len(losses),) * 2:
                raise InputError(
                    f"balancing by {type(self).__name__} needs the inner products of the gradients of {len(losses)} losses, "
                    f"an array {(len(losses),) * 2}, not {None if gram is None else gram.shape}"
                )
            dtype = jnp.promote_types(dtype, gram.dtype)
            values, gram = values.astype(dtype), jax.lax.stop_gradient(gram.astype(dtype))
            # All rules are indifferent to a common scale; with the largest gradient at 1, rounding has a size.
            squares = jnp.where(known, jnp.diagonal(gram), 0)
            largest = jnp.max(squares)
            taking_part = known & (squares > jnp.finfo(dtype).eps ** 2 * largest)
            gram = jnp.where(taking_part[:, None] & taking_part[None, :], gram / jnp.where(largest > 0, largest, 1), 0)
        weights, new = self.rule(state, values, taking_part, gram, rng)
        keep = lambda now, before: jnp.where(taking_part, now, before).astype(jnp.float32)
        return keep(weights, 1), jax.tree.map(keep, new, state)

    def end_epoch(self, state: dict[str, Array]) -> dict[str, Array]:
        """The state after an epoch."""
        return state

    def rule(
        self, state: dict[str, Array], losses: Array, known: Array, gram: Array | None, rng: Array
    ) -> tuple[Array, dict[str, Array]]:
        """What a method is: as `__call__`, of cleaned input. What is not known is 0, and its results are thrown away.

        The largest squared norm in `gram` is 1 (or all are 0), and every known loss has a gradient.
        """
        return jnp.ones_like(losses), state

    def _check(self, holds: bool, option: str, what: str) -> None:
        if not holds:
            raise DeclarationError(f"{option} of {type(self).__name__} is {what}, not {getattr(self, option)!r}")


# ---------------------------------------------------------------------- by the values of the losses


@dataclasses.dataclass(frozen=True)
class Uncertainty(Balancer):
    """Weights by homoscedastic uncertainty, w_i = 1 / σ_i², each σ_i² learned with its loss.

    L = Σ_i exp(−s_i) · ℓ_i + s_i / 2,  s_i = log σ_i²;  s_i ← s_i − rate · (1/2 − exp(−s_i) · ℓ_i)

    For cross-entropy this is the published loss; for squared errors too, up to a constant in s. Its minimum is σ_i² = 2 ℓ_i, so
    in the end each loss contributes 1/2, whatever its scale. No step goes beyond the minimum for the loss that it sees. The
    weights are not normalised: their size is what is learned.

    Kendall et al. 2018 (arXiv:1705.07115). Twice these weights is the part "L" of IMTL.

    Attributes:
        rate: learning rate of s.
        most: largest weight; without a bound that of a loss that reaches 0 grows for ever.
    """

    rate: float = 0.01
    most: float = 100.0

    def __post_init__(self):
        super().__post_init__()
        self._check(self.rate > 0, "rate", "above 0")
        self._check(self.most >= 1, "most", "1 or more")

    def init(self, count: int) -> dict[str, Array]:
        return {"log_variance": jnp.zeros(count, jnp.float32)}

    def rule(self, state, losses, known, gram, rng):
        s = state["log_variance"].astype(losses.dtype)
        weights = jnp.exp(-s)
        minimum = jnp.maximum(jnp.log(2 * jnp.maximum(losses, 1e-30)), -math.log(self.most))
        moved = s - self.rate * (0.5 - weights * losses)
        return weights, {"log_variance": jnp.clip(moved, jnp.minimum(s, minimum), jnp.maximum(s, minimum))}


@dataclasses.dataclass(frozen=True)
class DWA(Balancer):
    """Dynamic weight average: what fell least over the last two epochs counts most.

    w_i = n · softmax_i(r_i / temperature),  r_i = (mean ℓ_i of the last epoch) / (mean ℓ_i of the one before)

    r_i = 1 as long as two epochs have not been seen; an epoch that knows nothing of a loss is no epoch for it. The weights sum
    to the number n of the known.

    Liu et al. 2019 (arXiv:1803.10704).

    Attributes:
        temperature: the larger, the more alike are the weights.
    """

    temperature: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        self._check(self.temperature > 0, "temperature", "above 0")

    def init(self, count: int) -> dict[str, Array]:
        return {name: jnp.zeros(count, jnp.float32) for name in ("mean", "seen", "last", "before")}

    def rule(self, state, losses, known, gram, rng):
        # 0 in `before` is an epoch that was not seen.
        ratio = jnp.where(state["before"] > 0, state["last"] / jnp.where(state["before"] > 0, state["before"], 1), 1)
        seen = state["seen"] + 1
        # A mean that is moved stays exact over a long epoch, where a float32 sum would not.
        mean = state["mean"] + (losses - state["mean"]) / seen
        weights = _softmax(ratio.astype(losses.dtype) / self.temperature, known)
        return weights, dict(state) | {"mean": mean, "seen": seen}

    def end_epoch(self, state: dict[str, Array]) -> dict[str, Array]:
        some, zero = state["seen"] > 0, jnp.zeros_like(state["seen"])
        last, before = (jnp.where(some, state[new], state[old]) for new, old in (("mean", "last"), ("last", "before")))
        return {"mean": zero, "seen": zero, "last": last, "before": before}


@dataclasses.dataclass(frozen=True)
class RLW(Balancer):
    """Random loss weighting: w = n · softmax(z), z_i ~ N(0, 1) drawn anew in every step; n is the number of the known.

    Each weight is 1 on average. The baseline that every other method has to beat.

    Lin et al. 2022 (arXiv:2111.10603).
    """

    def rule(self, state, losses, known, gram, rng):
        return _softmax(jax.random.normal(rng, losses.shape, losses.dtype), known), state


@dataclasses.dataclass(frozen=True)
class GLS(Balancer):
    """Geometric loss strategy: the weights are the gradient of the geometric mean of the n known losses.

    L = (Π_i ℓ_i)^(1/n),  w_i = ∂L/∂ℓ_i = L / (n · ℓ_i)

    The weights are not normalised: they are what differentiating L itself gives, and all 1/n where the losses are equal.

    Chennupati et al. 2019 (arXiv:1904.08492).

    Attributes:
        least: losses below it count as it, where the derivative would have no bound.
    """

    least: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        self._check(self.least > 0, "least", "above 0")

    def rule(self, state, losses, known, gram, rng):
        logs, count = jnp.log(jnp.maximum(losses, self.least)), jnp.maximum(known.sum(), 1)
        return jnp.exp(jnp.sum(jnp.where(known, logs, 0)) / count - logs) / count, state


# ---------------------------------------------------------------------- by the gradients at the shared features


@dataclasses.dataclass(frozen=True)
class GradNorm(Balancer):
    """Gradient normalisation: weights move until all weighted gradients are as long as training rates ask.

    G_i = w_i · ‖g_i‖,  r_i = (ℓ_i / ℓ_i(0)) / mean_j (ℓ_j / ℓ_j(0)),  F = Σ_i |G_i − mean(G) · r_i^alpha|
    log w_i ← log w_i − rate · ∂F/∂(log w_i) / mean(G),  the targets mean(G) · r_i^alpha held constant

    As published, but for the two things that make the rate mean the same everywhere: the logarithm is moved, which keeps
    weights above 0, and F is measured in mean(G). ℓ_i(0) is the loss when it was first known. The weights are those after the
    move and sum to the number of the known.

    Chen et al. 2018 (arXiv:1711.02257).

    Attributes:
        alpha: how much more what learns slowly is to count; 0 makes all gradients equally long.
        rate: learning rate of log w, of one look.
    """

    every: int = 10
    alpha: float = 1.5
    rate: float = 0.025
    seam: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self._check(self.alpha >= 0, "alpha", "0 or more")
        self._check(self.rate > 0, "rate", "above 0")

    def init(self, count: int) -> dict[str, Array]:
        return {"weight": jnp.ones(count, jnp.float32), "initial": jnp.zeros(count, jnp.float32)}

    def rule(self, state, losses, known, gram, rng):
        # 0 is a loss that was not seen yet.
        initial = jnp.where(state["initial"] > 0, state["initial"], losses).astype(losses.dtype)
        count = jnp.maximum(known.sum(), 1)
        mean = lambda x: jnp.sum(jnp.where(known, x, 0)) / count
        before = jnp.where(known, state["weight"], 0).astype(losses.dtype)
        norms = before * jnp.sqrt(jnp.diagonal(gram))
        norms /= jnp.maximum(mean(norms), jnp.finfo(losses.dtype).tiny)
        progress = jnp.where(initial > 0, losses / jnp.where(initial > 0, initial, 1), 1)
        average = mean(progress)
        target = jnp.where(average > 0, progress / jnp.where(average > 0, average, 1), 1) ** self.alpha
        moved = before * jnp.exp(-self.rate * jnp.sign(norms - target) * norms)
        # The known keep their sum in the state, so that their proportion to the others survives batches that know some alone.
        moved *= jnp.sum(before) / jnp.maximum(jnp.sum(moved), jnp.finfo(losses.dtype).tiny)
        return _proportions(moved, known), {"weight": moved, "initial": initial}


@dataclasses.dataclass(frozen=True)
class PCGrad(Balancer):
    """Gradient surgery: each gradient is projected onto the normal plane of those it conflicts with, one after the other.

    d = Σ_i p_i;  p_i starts as g_i, and for all j ≠ i, in an order drawn anew for each i:
    where ⟨p_i, g_j⟩ < 0,  p_i ← p_i − (⟨p_i, g_j⟩ / ‖g_j‖²) · g_j

    Each p_i is kept as its coefficients A[i] of the gradients, so ⟨p_i, g_j⟩ = (A M)[i, j], and w = Σ_i A[i]. Without a
    conflict all weights are 1; what is projected away adds to the weights of the others, so w_i ≥ 1 and no sum is fixed.

    Yu et al. 2020 (arXiv:2001.06782).
    """

    every: int = 10
    seam: ClassVar[bool] = True

    @staticmethod
    def orders(rng: Array, count: int) -> Array:
        """int [count, count]: in row i, the order in which gradient i meets the others (and itself, which is no conflict)."""
        return jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(rng, count))

    def rule(self, state, losses, known, gram, rng):
        count, squares = len(losses), jnp.diagonal(gram)
        rows, orders = jnp.arange(count), self.orders(rng, count)

        def meet(step, coefficients):
            other = orders[:, step]
            inner = jnp.sum(coefficients * gram[other], 1)
            conflict = (inner < 0) & (rows != other)
            share = jnp.where(conflict, inner / jnp.where(conflict, squares[other], 1), 0)
            return coefficients.at[rows, other].add(-share)

        coefficients = jax.lax.fori_loop(0, count, meet, jnp.eye(count, dtype=gram.dtype))
        return jnp.sum(jnp.where(known[:, None], coefficients, 0), 0), state


@dataclasses.dataclass(frozen=True)
class MGDA(Balancer):
    """Multiple gradient descent: the shortest convex combination of the gradients, a direction in which no loss grows.

    w = n · argmin_{α ≥ 0, Σ_i α_i = 1} ‖Σ_i α_i · g_i‖

    The weights sum to the number n of the known. Long gradients get small weights; what has almost converged gets nearly all.

    Désidéri 2012 (doi:10.1016/j.crma.2012.03.014); Sener & Koltun 2018 (arXiv:1810.04650), for deep networks.
    """

    every: int = 10
    seam: ClassVar[bool] = True

    def rule(self, state, losses, known, gram, rng):
        return _proportions(_least_on_simplex(gram, jnp.zeros_like(losses), jnp.ones((), gram.dtype), known), known), state


@dataclasses.dataclass(frozen=True)
class CAGrad(Balancer):
    """Conflict-averse gradient: near the mean gradient, the direction in which the worst loss falls fastest.

    max_d min_i ⟨g_i, d⟩  subject to  ‖d − g_0‖ ≤ c · ‖g_0‖,  g_0 = mean_i g_i

    is solved through its dual: with g_w = Σ_i α_i · g_i,

    α = argmin_{α ≥ 0, Σ_i α_i = 1} ⟨g_w, g_0⟩ + c · ‖g_0‖ · ‖g_w‖,  d = g_0 + (c · ‖g_0‖ / ‖g_w‖) · g_w

    The weights are those of n · d, n the number of the known, so c = 0 is equal weights: w_i = 1 + n · α_i · c ‖g_0‖ / ‖g_w‖.
    They sum to more than n where c > 0, as published without rescaling.

    Liu et al. 2021 (arXiv:2110.14048).

    Attributes:
        c: how far d may leave the mean gradient; below 1 it still descends the mean loss.
    """

    every: int = 10
    c: float = 0.5
    seam: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self._check(self.c >= 0, "c", "0 or more")

    def rule(self, state, losses, known, gram, rng):
        count = jnp.maximum(known.sum(), 1)
        toward_mean = gram.sum(1) / count
        radius = self.c * jnp.sqrt(jnp.maximum(toward_mean.sum() / count, 0))
        alpha = _least_on_simplex(gram, toward_mean, radius, known)
        # A combination that is shorter than its rounding has no direction.
        length = jnp.sqrt(jnp.maximum(alpha @ (gram @ alpha), jnp.finfo(gram.dtype).eps))
        return 1 + count * alpha * radius / length, state


@dataclasses.dataclass(frozen=True)
class IMTL(Balancer):
    """Impartial learning, part "G": the combination that has the same projection on all gradients.

    ⟨Σ_j w_j · g_j, g_i / ‖g_i‖⟩ equal for all i:  w_i ∝ (C⁻¹ 1)_i / ‖g_i‖,  C[i, j] = cos(g_i, g_j)

    which is the published closed form, w_{2:} ∝ g_1 Uᵀ (D Uᵀ)⁻¹, without a first among equals. Where gradients depend on
    each other C has no inverse; its eigenvalues are bounded from below by √(machine epsilon), and identical gradients share.
    Weights may be below 0, as published. They sum to the number n of the known, unless the parts below 0 outweigh a third
    of those above: then Σ_i |w_i| = 2 n, where the published sum would make steps of any length, or turn them uphill.

    The part "L" scales each loss by an e^{s_i} that is learned so that e^{s_i} · ℓ_i → 1. It is left out: the direction here
    does not depend on the scale of the losses, and heads learn from their own loss as it is. `Uncertainty` does the same for
    whole losses.

    Liu et al. 2021, ICLR (openreview.net/forum?id=IMPnRXEWpvr).
    """

    every: int = 10
    seam: ClassVar[bool] = True

    def rule(self, state, losses, known, gram, rng):
        norms = jnp.sqrt(jnp.where(known, jnp.diagonal(gram), 1))
        # The unknown are orthogonal to all, and answer for themselves alone.
        cosines = jnp.where(known[:, None] & known[None, :], gram / norms[:, None] / norms[None, :], jnp.eye(len(losses)))
        values, vectors = jnp.linalg.eigh(cosines.astype(gram.dtype))
        # High enough for the rounding of M not to be taken for a difference, low enough for angles of 2°.
        values = jnp.maximum(values, math.sqrt(jnp.finfo(gram.dtype).eps))
        raw = jnp.where(known, vectors @ (jnp.sum(vectors, 0) / values) / norms, 0)
        total = jnp.maximum(jnp.sum(raw), jnp.sum(jnp.abs(raw)) / 2)
        return raw * (known.sum() / jnp.where(total > 0, total, 1)), state


BALANCERS: dict[str, type[Balancer]] = {
    "equal": Balancer,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "rlw": RLW,
    "gls": GLS,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "imtl": IMTL,
}


def balancer(name: str, **options: Any) -> Balancer:
    """The method of a name in `BALANCERS`.

    Args:
        options: fields of its class.

    Raises:
        DeclarationError: no such method, or no such option of it, or an option out of its range.

    Example:
        >>> balancer("cagrad", c=0.4)
        CAGrad(every=10, c=0.4)
    """
    if name not in BALANCERS:
        raise DeclarationError(f"no way of balancing losses is called '{name}': one of {', '.join(BALANCERS)}")
    known = [f.name for f in dataclasses.fields(BALANCERS[name])]
    if unknown := [option for option in options if option not in known]:
        raise DeclarationError(f"balancing by '{name}' has no options {unknown}; there are {known}")
    return BALANCERS[name](**options)


# ---------------------------------------------------------------------- what methods share


def _proportions(raw: Array, known: Array) -> Array:
    """Weights in proportion to `raw` ≥ 0 that sum to the number of the known; 0 elsewhere."""
    raw = jnp.where(known, raw, 0)
    total = jnp.sum(raw)
    return raw * (known.sum() / jnp.where(total > 0, total, 1))


def _softmax(scores: Array, known: Array) -> Array:
    """A softmax over the known that sums to their number."""
    return jax.nn.softmax(jnp.where(known, scores, jnp.finfo(scores.dtype).min)) * known.sum()


def _least_on_simplex(gram: Array, linear: Array, radius: Array, known: Array, steps: int = 100) -> Array:
    """argmin_α linearᵀα + radius · √(αᵀ M α)  over α ≥ 0, Σ_i α_i = 1, α_i = 0 where not known.

    In each step one pair exchanges what makes the function least, which has a closed form. The pair is the one whose step
    gains most to second order: sequential minimal optimisation (Platt 1998; Fan et al. 2005, JMLR 6:1889), or Frank-Wolfe in
    pairs. Unlike projected gradients it does not mind gradients of very different lengths, nor that a norm has no bounded
    curvature near 0. Of 2 to 16 random gradients, lengths up to 1:100, 100 steps find the least norm to rounding where there
    are more dimensions than gradients; where there are fewer, and 0 is among the combinations, to 1% of the longest.
    """
    eps, count, squares = jnp.finfo(gram.dtype).eps, len(linear), jnp.diagonal(gram)
    tiny = jnp.finfo(gram.dtype).tiny
    # ‖g_i − g_j‖², not below its rounding.
    both = squares[:, None] + squares[None, :]
    apart = jnp.maximum(both - 2 * gram, jnp.maximum(eps * both, tiny))
    radius = jnp.where(radius > 0, radius, 1)

    def exchange(_, alpha):
        products = gram @ alpha
        square = jnp.maximum(alpha @ products, 0)
        slopes = linear + radius * products / jnp.sqrt(jnp.maximum(square, eps))
        # What the function falls by where i takes from j.
        fall = slopes[None, :] - slopes[:, None]
        gain = jnp.where((fall > 0) & known[:, None] & (alpha > 0)[None, :], fall**2 / apart, 0)
        best = jnp.argmax(gain)
        i, j = best // count, best % count
        # f(t) = linear + t (linear_i − linear_j) + radius √(square + 2 q t + r t²) is least where (q + r t) / √… = b.
        r, q, b = apart[i, j], products[i] - products[j], (linear[j] - linear[i]) / radius
        rest, curved = jnp.maximum(square - q**2 / r, 0), 1 - b**2 / r
        inner = (b * jnp.sqrt(rest / jnp.where(curved > 0, curved, 1)) - q) / r
        t = jnp.where(curved > 0, inner, jnp.sign(b))
        t = jnp.where(gain[i, j] > 0, jnp.clip(t, 0, alpha[j]), 0)
        return alpha.at[i].add(t).at[j].add(-t)

    start = known / jnp.maximum(known.sum(), 1).astype(gram.dtype)
    return jax.lax.fori_loop(0, steps, exchange, start)
