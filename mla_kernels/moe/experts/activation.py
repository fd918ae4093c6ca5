"""The gated activation of an expert: SwiGLU, with each clamp that models use, on values and backwards.

Symbols: g the gate projection's result, u the up projection's, L the limit.
"""

import functools
from dataclasses import dataclass, field
from enum import Enum

from mla_kernels.checks import check_choice
from mla_kernels.language import tl, triton


class Clamp(str, Enum):
    """Where an expert's activation is cut off at the limit L.

    ========= ============================================================ =======================================
    clamp     activation                                                   found in
    ========= ============================================================ =======================================
    none      silu(g) u                                                    DeepSeek-V2, DeepSeek-V3
    pre       silu(min(g, L)) clamp(u, -L, L)                              DeepSeek-V4
    post      min(silu(g), L) clamp(u, -L, L)                              Step-3.5
    gpt_oss   g' sigmoid(alpha g') (u' + 1), g' = min(g, L), u' = clamp(u) gpt-oss
    ========= ============================================================ =======================================
    """

    NONE = "none"
    PRE = "pre"
    POST = "post"
    GPT_OSS = "gpt_oss"


_CLAMPS = {clamp.value: clamp for clamp in Clamp}  # torch 2.11 traces this, and not Clamp(value)


@dataclass(frozen=True)
class Activation:
    """What stands between an expert's two matrix products.

    Gradients are 0 where a value is past its limit. One that lies on the limit is not clamped: its gradient is that of
    the values before it, on every backend (``torch.clamp`` has 1 there up to torch 2.13, and 0 since).

    Args:
        clamp: a :class:`Clamp` or its value.
        limit: L, above 0; None with ``clamp="none"`` and only there.
        alpha: the slope inside gpt-oss's sigmoid; used with ``clamp="gpt_oss"`` only.
        interleaved: the even rows of gate_up (and of its bias) are the gate's and the odd ones up's; else the first
            half is the gate's and the second half up's.

    Raises:
        ValueError: an unknown clamp, a limit that is missing, superfluous or not above 0.
    """

    clamp: Clamp | str = Clamp.NONE
    limit: float | None = None
    alpha: float = 1.702
    interleaved: bool = False
    arguments: tuple[str, float | None, float, bool] = field(init=False, repr=False, compare=False)
    """clamp, limit, alpha, interleaved: what a torch op takes, for :data:`OP_ARGUMENTS`."""

    def __post_init__(self):
        check_choice("clamp", self.clamp, tuple(_CLAMPS))
        object.__setattr__(self, "clamp", _CLAMPS[self.clamp])
        if self.clamp is Clamp.NONE and self.limit is not None:
            raise ValueError(f"limit: got {self.limit} with clamp 'none', None is accepted there")
        if self.clamp is not Clamp.NONE and (self.limit is None or not self.limit > 0):
            raise ValueError(f"limit: got {self.limit} with clamp {self.clamp.value!r}, a number above 0 is accepted")
        if self.limit is not None:
            object.__setattr__(self, "limit", float(self.limit))
        object.__setattr__(self, "alpha", float(self.alpha))
        arguments = (self.clamp.value, self.limit, self.alpha, self.interleaved)
        object.__setattr__(self, "arguments", arguments)


OP_ARGUMENTS = "str clamp, float? limit, float alpha, bool interleaved"
"""An activation in an op's schema; :func:`activation_of` is the way back."""

activation_of = functools.cache(Activation)
SWIGLU = Activation()
"""silu(gate) * up without a clamp: DeepSeek-V2's and V3's experts, and the default."""

OP_OPTIONS = f"str clamp='none', float? limit=None, float alpha={SWIGLU.alpha}, bool interleaved=False"
"""The same in the schema of an op that need not be told: :data:`SWIGLU`."""


@triton.jit
def _below(x, limit):
    """min(x, limit), NaN kept (the minimum of GPUs drops it)."""
    return tl.where(x > limit, limit, x)


@triton.jit
def _within(x, limit):
    """x clamped to -limit .. limit, NaN kept."""
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@triton.jit
def gated(gate, up, limit, alpha, CLAMP: tl.constexpr):
    """The activation of fp32 tiles. ``limit`` is not used with CLAMP "none", ``alpha`` only with "gpt_oss"."""
    if CLAMP == "none":
        result = gate / (1.0 + tl.exp(-gate)) * up
    elif CLAMP == "pre":
        gate = _below(gate, limit)
        result = gate / (1.0 + tl.exp(-gate)) * _within(up, limit)
    elif CLAMP == "post":
        result = _below(gate / (1.0 + tl.exp(-gate)), limit) * _within(up, limit)
    else:
        gate = _below(gate, limit)
        result = gate / (1.0 + tl.exp(-alpha * gate)) * (_within(up, limit) + 1.0)
    return result


@triton.jit
def gate_up_rows(n, intermediate, INTERLEAVED: tl.constexpr):
    """Rows of the weight that give column ``n`` of the gate and of up."""
    if INTERLEAVED:
        gate_row = 2 * n
        up_row = 2 * n + 1
    else:
        gate_row = n
        up_row = n + intermediate
    return gate_row, up_row


@triton.jit
def activate(
    gate, up, bias, weights, pair, expert, n, intermediate, limit, alpha,
    HAS_BIAS: tl.constexpr, CLAMP: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT_AT: tl.constexpr,
):  # fmt: skip
    """The activation of a tile of gate's and up's sums (fp32 [BLOCK_M, BLOCK_N]), columns ``n``, and 0 past the last
    column. The pairs' weights multiply, WEIGHT_AT "input", the sums, which is as good as multiplying the input, or, at
    "activation", the result."""
    inside = n < intermediate
    if WEIGHT_AT != "none":
        weight = tl.load(weights + pair)  # [BLOCK_M]
    if WEIGHT_AT == "input":
        gate = gate * weight[:, None]
        up = up * weight[:, None]
    if HAS_BIAS:
        base = bias + tl.cast(expert, tl.int64) * 2 * intermediate
        gate_row, up_row = gate_up_rows(n, intermediate, INTERLEAVED)
        gate += tl.load(base + gate_row, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(base + up_row, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = gated(gate, up, limit, alpha, CLAMP)
    if WEIGHT_AT == "activation":
        y = y * weight[:, None]
    return tl.where(inside[None, :], y, 0.0)


@triton.jit
def gated_gradient(gate, up, grad, limit, alpha, CLAMP: tl.constexpr):
    """Gradients of gate and of up, from the gradient of :func:`gated`'s result. A clamped value gets 0; one that lies
    on the limit is not clamped."""
    if CLAMP == "none":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = grad * gate * sigmoid
    elif CLAMP == "post":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        slope = tl.where(silu > limit, 0.0, sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        d_gate = grad * _within(up, limit) * slope
        d_up = tl.where((up < -limit) | (up > limit), 0.0, grad * _below(silu, limit))
    else:
        x = _below(gate, limit)
        if CLAMP == "pre":
            factor = _within(up, limit)
            slope_in = 1.0
        else:
            factor = _within(up, limit) + 1.0
            slope_in = alpha
        sigmoid = 1.0 / (1.0 + tl.exp(-slope_in * x))
        slope = tl.where(gate > limit, 0.0, sigmoid * (1.0 + slope_in * x * (1.0 - sigmoid)))
        d_gate = grad * factor * slope
        d_up = tl.where((up < -limit) | (up > limit), 0.0, grad * x * sigmoid)
    return d_gate, d_up
