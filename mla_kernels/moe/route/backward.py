"""Gradient of a router's weights with respect to its logits, for `route` and `hash_route`.

Symbols: T tokens, E experts, K = top_k, S = num_shared.
"""

from mla_kernels.cpu import route as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, chip_of
from mla_kernels.moe.route.scores import (
    near_rows,
    router_scores,
    router_statics,
    router_tiles,
    router_work,
    score_slopes,
)
from mla_kernels.shim import define_op


@triton.jit(
    do_not_specialize=["tokens", "logits_stride", "grad_stride"],
    do_not_specialize_on_alignment=["weights_grad", "logits", "weights", "ids", "logits_grad"],
)
def route_backward_kernel(
    weights_grad,
    logits,
    weights,
    ids,
    logits_grad,
    tokens,
    logits_stride,
    grad_stride,
    routed_scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One item takes BLOCK_T tokens. A slot of weight 0 has no gradient: it is empty, its expert's score was put to 0
    with its group, or the score is 0 itself."""
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_T)
    expert_f = expert.to(tl.float32)[None, :]
    slot_f = slot.to(tl.float32)
    for item in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        first = tl.cast(item * BLOCK_T, tl.int64)
        in_range = (lane < tokens - item * BLOCK_T)[:, None]
        inside = in_range & (expert < EXPERTS)[None, :]
        rows = logits + first * logits_stride + lane[:, None] * logits_stride
        x = tl.load(rows + expert[None, :], mask=inside, other=float("-inf")).to(tl.float32)  # [BLOCK_T, BLOCK_E]
        present = (x == x) & (expert_f < EXPERTS)
        x = tl.where(present, x, 0.0)
        scores = tl.where(present, router_scores(x, present, SCORING), 0.0)

        routed = in_range & (slot < TOP_K)[None, :]
        place = first * (TOP_K + SHARED) + lane[:, None] * (TOP_K + SHARED) + slot[None, :]
        chosen = tl.load(ids + place, mask=routed, other=-1).to(tl.float32)  # [BLOCK_T, BLOCK_K]
        weight = tl.load(weights + place, mask=routed, other=0.0)
        grads = weights_grad + first * grad_stride + lane[:, None] * grad_stride + slot[None, :]
        toward = tl.load(grads, mask=routed, other=0.0)
        chosen = tl.where((weight != 0.0) & (slot_f < TOP_K)[None, :], chosen, -1.0)

        total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)  # gradient of each expert's weight
        times = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)  # how often it was chosen
        for k in range(TOP_K):
            here = (slot_f == k)[None, :]
            picked = tl.max(tl.where(here, chosen, -1.0), 1)  # [BLOCK_T]
            gradient = tl.sum(tl.where(here, toward, 0.0), 1)
            hit = expert_f == picked[:, None]
            total += tl.where(hit, gradient[:, None], 0.0)
            times += tl.where(hit, 1.0, 0.0)
        if RENORMALIZE:
            norm = tl.sum(times * scores, 1)[:, None] + 1.0e-20
            mean = tl.sum(total * scores, 1)[:, None] / norm
            total = (total - times * mean) / norm
        if SCORING == "softmax":
            total -= tl.sum(total * scores, 1)[:, None]
        slopes = scores * score_slopes(x, scores, SCORING)
        gradient = tl.where(scores > 0.0, total * slopes * routed_scale, 0.0)
        out = logits_grad + first * EXPERTS + lane[:, None] * EXPERTS + expert[None, :]
        tl.store(out, gradient.to(logits_grad.dtype.element_ty), mask=inside)


def _cost(dtype, statics, sizes):
    tokens, experts, top_k = sizes["tokens"], statics["EXPERTS"], statics["TOP_K"]
    size = DTYPE_BYTES[dtype]
    return Cost(flops=tokens * experts * (16 + 4 * top_k), bytes=tokens * (2 * experts * size + 12 * top_k))


ROUTE_BACKWARD = Kernel(
    route_backward_kernel,
    arguments={
        "weights_grad": "*fp32",
        "logits": "*T",
        "weights": "*fp32",
        "ids": "*i32",
        "logits_grad": "*T",
        "tokens": "i32",
        "logits_stride": "i32",
        "grad_stride": "i32",
        "routed_scale": "fp32",
    },
    statics=tuple(router_statics(8, 1, 0, "sigmoid", True, 1)),
    **router_tiles(1024),
    cost=_cost,
    work=router_work(_cost),
    cases=(
        Case("v3", router_statics(256, 8, 0, "sigmoid", True, 8), {"tokens": 4096}),
        Case("v2", router_statics(160, 6, 0, "softmax", False, 6), {"tokens": 4096}, dtypes=("bf16",)),
        Case("v4", router_statics(384, 6, 1, "sqrt_softplus", True, 6), {"tokens": 4096}, dtypes=("bf16",)),
    ),
    uses_dot=False,
)


def _launch(weights_grad, logits, weights, ids, scoring, renormalize, routed_scale, num_shared, batch_invariant):
    if weights_grad.stride(1) != 1:
        weights_grad = weights_grad.contiguous()
    tokens, experts = logits.shape
    logits_grad = logits.new_empty(logits.shape)
    top_k = ids.shape[1] - num_shared
    statics = router_statics(experts, top_k, num_shared, scoring, renormalize, top_k)
    chip = chip_of(logits.device)
    tile = ROUTE_BACKWARD.tile_for(chip, DTYPE_NAMES[logits.dtype], statics, {"tokens": tokens})
    logits, weights_grad = near_rows(logits), near_rows(weights_grad)
    strides = logits.stride(0), weights_grad.stride(0)
    args = (weights_grad, logits, weights, ids, logits_grad, tokens, *strides, routed_scale)
    ROUTE_BACKWARD.launch(chip, -(-tokens // tile["BLOCK_T"]), args, statics, tile)
    return logits_grad


def _fake(weights_grad, logits, *_):
    return logits.new_empty(logits.shape)


def _refuse(ctx, *grads):
    raise NotImplementedError("route and hash_route have no second derivative")


_op = define_op(
    "route_backward",
    "(Tensor weights_grad, Tensor logits, Tensor weights, Tensor ids, str scoring, bool renormalize, "
    "float routed_scale, int num_shared, bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.route_backward, 0, 1, 2, 3),
    device=_launch,
    fake=_fake,
    autograd=(lambda ctx, inputs, output: None, _refuse),
)


def save_for_backward(ctx, logits, output, *settings):
    """What `route_backward` needs; ``settings`` are scoring, renormalize, routed_scale, num_shared and
    batch_invariant."""
    ctx.save_for_backward(logits, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = settings


def route_backward(ctx, weights_grad):
    """Gradient of the logits [T, E], in their dtype, from that of the weights."""
    return _op(weights_grad, *ctx.saved_tensors, *ctx.settings)
