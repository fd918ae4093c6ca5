"""balance_loss: the auxiliary loss of a router, for each sequence or over all tokens, and its gradient.

Symbols: T tokens, E experts, K = top_k, S num_shared, N sequences (1 where all tokens are one). A sequence's tokens are
cut into ``splits`` runs, each summed by one program; the runs are added in order, so results do not depend on timing.
"""

import torch

from mla_kernels.checks import FLOATS, check_choice, check_int, check_tensor
from mla_kernels.cpu import balance as cpu
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.route.scores import SCORINGS, near_rows, router_scores, score_slopes
from mla_kernels.shim import define_op

SPLIT_TOKENS, MAX_SPLITS = 64, 64  # tokens of a run at least, and runs of a sequence at most


@triton.jit
def token_run(cu_seqlens, item, splits, tokens, SEQUENCES: tl.constexpr):
    """(sequence, first token, end) of run ``item``: inside the tensors, whatever cu_seqlens holds."""
    sequence = item // splits
    start = tl.cast(0, tl.int32)
    end = tl.cast(tokens, tl.int32)
    if SEQUENCES:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), start), tokens)
    length = tl.cdiv(end - start, splits)
    first = tl.minimum(start + (item - sequence * splits) * length, end)
    return sequence, first, tl.minimum(first + length, end)


@triton.jit
def probabilities(
    logits, first, count, logits_stride, EXPERTS: tl.constexpr, SCORING: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(logits, scores, scores over their sum) [BLOCK_T, BLOCK_E] of ``count`` tokens from ``first`` on; 0 elsewhere."""
    expert = tl.arange(0, BLOCK_E)
    lane = tl.arange(0, BLOCK_T)
    inside = (lane < count)[:, None] & (expert < EXPERTS)[None, :]
    rows = logits + tl.cast(first, tl.int64) * logits_stride + lane[:, None] * logits_stride
    x = tl.load(rows + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    real = (lane.to(tl.float32) < count)[:, None] & (expert.to(tl.float32) < EXPERTS)[None, :]
    present = (x == x) & real
    x = tl.where(present, x, 0.0)
    scores = router_scores(x, present, SCORING)
    scores = tl.where(present & (scores == scores), scores, 0.0)
    total = tl.sum(scores, 1)[:, None]
    return x, scores, scores / tl.where(total > 0.0, total, 1.0)


@triton.jit
def balance_sums_kernel(
    logits,
    ids,
    cu_seqlens,
    sums,
    tokens,
    work,
    splits,
    logits_stride,
    ids_stride,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One item takes a run of tokens: sums [2, BLOCK_E] of how often each expert was chosen and of its probability."""
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_T)
    expert_f = expert.to(tl.float32)[None, :]
    slot_f = slot.to(tl.float32)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        _sequence, start, end = token_run(cu_seqlens, item, splits, tokens, SEQUENCES)
        chosen_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        probability_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for first in range(start, end, BLOCK_T):
            count = end - first
            _x, _scores, probability = probabilities(
                logits, first, count, logits_stride, EXPERTS, SCORING, BLOCK_E, BLOCK_T
            )  # fmt: skip
            probability_sum += probability
            rows = ids + tl.cast(first, tl.int64) * ids_stride + lane[:, None] * ids_stride
            inside = (lane < count)[:, None] & (slot < TOP_K)[None, :]
            chosen = tl.load(rows + slot[None, :], mask=inside, other=-1).to(tl.float32)  # [BLOCK_T, BLOCK_K]
            chosen = tl.where((lane.to(tl.float32) < count)[:, None], chosen, -1.0)
            for k in range(TOP_K):
                picked = tl.max(tl.where((slot_f == k)[None, :], chosen, -1.0), 1)
                chosen_sum += tl.where(expert_f == picked[:, None], 1.0, 0.0)
        target = sums + tl.cast(item, tl.int64) * (2 * BLOCK_E) + expert
        tl.store(target, tl.sum(chosen_sum, 0))
        tl.store(target + BLOCK_E, tl.sum(probability_sum, 0))


@triton.jit
def balance_loss_kernel(
    sums,
    cu_seqlens,
    losses,
    fractions,
    tokens,
    sequences,
    splits,
    scale,
    EXPERTS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One item takes a sequence: its loss, and the factor of each expert's mean probability in it, over its tokens."""
    expert = tl.arange(0, BLOCK_E)
    for sequence in range(tl.program_id(0), sequences, tl.num_programs(0)):
        length = tl.cast(tokens, tl.int32)
        if SEQUENCES:
            start = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), tokens)
            length = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), start), tokens) - start
        chosen = tl.zeros([BLOCK_E], tl.float32)
        probability = tl.zeros([BLOCK_E], tl.float32)
        for split in range(splits):
            source = sums + (tl.cast(sequence, tl.int64) * splits + split) * (2 * BLOCK_E) + expert
            chosen += tl.load(source)
            probability += tl.load(source + BLOCK_E)
        mean = 1.0 / tl.maximum(length, 1).to(tl.float32)
        fraction = chosen * (scale * mean * mean)
        tl.store(losses + sequence, tl.sum(fraction * probability, 0))
        target = fractions + tl.cast(sequence, tl.int64) * EXPERTS + expert
        tl.store(target, fraction, mask=expert < EXPERTS)


@triton.jit
def balance_gradient_kernel(
    losses_grad,
    logits,
    fractions,
    cu_seqlens,
    logits_grad,
    tokens,
    work,
    splits,
    logits_stride,
    losses_stride,
    EXPERTS: tl.constexpr,
    SCORING: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One item takes a run of tokens, as in the forward."""
    expert = tl.arange(0, BLOCK_E)
    lane = tl.arange(0, BLOCK_T)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        sequence, start, end = token_run(cu_seqlens, item, splits, tokens, SEQUENCES)
        toward = tl.load(losses_grad + tl.cast(sequence, tl.int64) * losses_stride)
        row = fractions + tl.cast(sequence, tl.int64) * EXPERTS + expert
        factor = tl.load(row, mask=expert < EXPERTS, other=0.0) * toward  # [BLOCK_E]
        for first in range(start, end, BLOCK_T):
            count = end - first
            x, scores, probability = probabilities(
                logits, first, count, logits_stride, EXPERTS, SCORING, BLOCK_E, BLOCK_T
            )  # fmt: skip
            mean = tl.sum(probability * factor[None, :], 1)[:, None]
            gradient = probability * score_slopes(x, scores, SCORING) * (factor[None, :] - mean)
            gradient = tl.where(probability > 0.0, gradient, 0.0)
            target = logits_grad + tl.cast(first, tl.int64) * EXPERTS + lane[:, None] * EXPERTS + expert[None, :]
            inside = (lane < count)[:, None] & (expert < EXPERTS)[None, :]
            tl.store(target, gradient.to(logits_grad.dtype.element_ty), mask=inside)


def _rule(chip, dtype, statics, sizes):
    """About 1024 scores at a time, whatever the sizes, so that sums keep their bits."""
    return {"BLOCK_T": max(1, min(16, 1024 // statics["BLOCK_E"])), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    tile_bytes = tile["BLOCK_T"] * statics["BLOCK_E"] * 4
    return {"shared": 4 * tile["num_warps"] * tile["BLOCK_T"] * 4} if chip.is_gpu else {"UB": 24 * tile_bytes}


def _runs(sizes):
    """Runs of each sequence. They depend on shapes alone."""
    tokens, sequences = sizes["tokens"], sizes["sequences"]
    return max(1, min(MAX_SPLITS, -(-tokens // (max(sequences, 1) * SPLIT_TOKENS))))


def _sums_cost(dtype, statics, sizes):
    experts, top_k = statics["EXPERTS"], statics["TOP_K"]
    return Cost(
        flops=sizes["tokens"] * experts * (10.0 + 2 * top_k),
        bytes=sizes["tokens"] * (experts * DTYPE_BYTES[dtype] + 4.0 * top_k),
        workspace=8.0 * statics["BLOCK_E"] * _runs(sizes) * sizes["sequences"],
    )


def _gradient_cost(dtype, statics, sizes):
    experts = statics["EXPERTS"]
    return Cost(flops=16.0 * sizes["tokens"] * experts, bytes=2.0 * sizes["tokens"] * experts * DTYPE_BYTES[dtype])


def _work_of(cost):
    def work(dtype, statics, sizes, tile):
        whole, programs = cost(dtype, statics, sizes), _runs(sizes) * sizes["sequences"]
        return Work(programs, whole.flops * statics["BLOCK_E"] / statics["EXPERTS"] / programs, whole.bytes / programs)

    return work


def _loss_cost(dtype, statics, sizes):
    runs = _runs(sizes) * sizes["sequences"]
    return Cost(flops=4.0 * runs * statics["EXPERTS"], bytes=8.0 * runs * statics["EXPERTS"])


def _loss_work(dtype, statics, sizes, tile):
    runs = _runs(sizes)
    return Work(sizes["sequences"], 4.0 * runs * statics["BLOCK_E"], 8.0 * runs * statics["BLOCK_E"])


def _statics(experts, top_k, scoring, has_sequences):
    return {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "SCORING": scoring,
        "SEQUENCES": has_sequences,
        "BLOCK_E": max(16, 1 << (experts - 1).bit_length()),
        "BLOCK_K": max(8, 1 << (top_k - 1).bit_length()),
    }


def _part(statics, names):
    return {name: statics[name] for name in names}


_SUMS = ("EXPERTS", "TOP_K", "SCORING", "SEQUENCES", "BLOCK_E", "BLOCK_K")
_LOSS = ("EXPERTS", "SEQUENCES", "BLOCK_E")
_GRADIENT = ("EXPERTS", "SCORING", "SEQUENCES", "BLOCK_E")
_V3 = _statics(256, 8, "sigmoid", True), {"tokens": 8192, "sequences": 4}
_V2 = _statics(160, 6, "softmax", False), {"tokens": 8192, "sequences": 1}
_TILES = {"BLOCK_T": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4)}


def _cases(names, dtypes=("bf16", "fp16", "fp32")):
    return (
        Case("v3_sequences", _part(_V3[0], names), _V3[1], dtypes),
        Case("v2_batch", _part(_V2[0], names), _V2[1], ("bf16",)),
    )


BALANCE_SUMS = Kernel(
    balance_sums_kernel,
    arguments={
        "logits": "*T",
        "ids": "*i32",
        "cu_seqlens": "*i32",
        "sums": "*fp32",
        **dict.fromkeys(("tokens", "work", "splits"), "i32"),
        "logits_stride": "i32:16",
        "ids_stride": "i32",
    },
    statics=_SUMS,
    tiles=_TILES,
    rule=_rule,
    memory=_memory,
    cost=_sums_cost,
    work=_work_of(_sums_cost),
    cases=_cases(_SUMS),
    uses_dot=False,
)

BALANCE_LOSS = Kernel(
    balance_loss_kernel,
    arguments={
        "sums": "*fp32",
        "cu_seqlens": "*i32",
        "losses": "*fp32",
        "fractions": "*fp32",
        **dict.fromkeys(("tokens", "sequences", "splits"), "i32"),
        "scale": "fp32",
    },
    statics=_LOSS,
    tiles={"num_warps": (1, 4)},
    rule=lambda chip, dtype, statics, sizes: {"num_warps": 4},
    memory=lambda chip, dtype, statics, tile: {"shared": 64} if chip.is_gpu else {"UB": 48 * statics["BLOCK_E"]},
    cost=_loss_cost,
    work=_loss_work,
    cases=_cases(_LOSS, ("bf16",)),  # no element type enters
    uses_dot=False,
)

BALANCE_GRADIENT = Kernel(
    balance_gradient_kernel,
    arguments={
        "losses_grad": "*fp32",
        "logits": "*T",
        "fractions": "*fp32",
        "cu_seqlens": "*i32",
        "logits_grad": "*T",
        **dict.fromkeys(("tokens", "work", "splits"), "i32"),
        "logits_stride": "i32:16",
        "losses_stride": "i32",
    },
    statics=_GRADIENT,
    tiles=_TILES,
    rule=_rule,
    memory=_memory,
    cost=_gradient_cost,
    work=_work_of(_gradient_cost),
    cases=_cases(_GRADIENT),
    uses_dot=False,
)


def _sequences(cu_seqlens):
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _outputs(logits, cu_seqlens):
    sequences = _sequences(cu_seqlens)
    losses = logits.new_empty(sequences, dtype=torch.float32)
    return losses, losses.new_empty(sequences, logits.shape[1])


def _launch(logits, ids, cu_seqlens, scoring, num_shared, divide_by_top_k, coefficient):
    tokens, experts = logits.shape
    top_k = ids.shape[1] - num_shared
    losses, fractions = _outputs(logits, cu_seqlens)
    sizes = {"tokens": tokens, "sequences": losses.shape[0]}
    statics, splits = _statics(experts, top_k, scoring, cu_seqlens is not None), _runs(sizes)
    work = sizes["sequences"] * splits
    sums = losses.new_empty(work, 2, statics["BLOCK_E"])
    chip, dtype = chip_of(logits.device), DTYPE_NAMES[logits.dtype]
    logits, ids = near_rows(logits), near_rows(ids)
    bounds = ids if cu_seqlens is None else cu_seqlens

    constants = _part(statics, _SUMS)
    arguments = (logits, ids, bounds, sums, tokens, work, splits, logits.stride(0), ids.stride(0))
    BALANCE_SUMS.launch(chip, work, arguments, constants, BALANCE_SUMS.tile_for(chip, dtype, constants, sizes))

    constants = _part(statics, _LOSS)
    scale = coefficient * experts / (top_k if divide_by_top_k else 1)
    arguments = (sums, bounds, losses, fractions, tokens, sizes["sequences"], splits, scale)
    tile = BALANCE_LOSS.tile_for(chip, "bf16", constants, sizes)
    BALANCE_LOSS.launch(chip, sizes["sequences"], arguments, constants, tile)
    return losses, fractions


def _fake(logits, ids, cu_seqlens, scoring, num_shared, divide_by_top_k, coefficient):
    return _outputs(logits, cu_seqlens)


def _check_values(logits, ids, cu_seqlens, scoring, num_shared, divide_by_top_k, coefficient):
    if cu_seqlens is None:
        return
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > logits.shape[0]:
        raise ValueError(
            f"cu_seqlens: got {bounds}, values that never fall, from 0 to the number of tokens, {logits.shape[0]}, "
            "are accepted"
        )


def _launch_gradient(losses_grad, logits, fractions, cu_seqlens, scoring):
    tokens, experts = logits.shape
    sizes = {"tokens": tokens, "sequences": fractions.shape[0]}
    statics, splits = _part(_statics(experts, 1, scoring, cu_seqlens is not None), _GRADIENT), _runs(sizes)
    work = sizes["sequences"] * splits
    new = logits.new_empty if cu_seqlens is None else logits.new_zeros  # tokens of no sequence have no gradient
    logits_grad = new(logits.shape)
    chip = chip_of(logits.device)
    tile = BALANCE_GRADIENT.tile_for(chip, DTYPE_NAMES[logits.dtype], statics, sizes)
    bounds = fractions if cu_seqlens is None else cu_seqlens
    logits = near_rows(logits)
    strides = logits.stride(0), losses_grad.stride(0)
    arguments = (losses_grad, logits, fractions, bounds, logits_grad, tokens, work, splits, *strides)
    BALANCE_GRADIENT.launch(chip, work, arguments, statics, tile)
    return logits_grad


def _fake_gradient(losses_grad, logits, fractions, cu_seqlens, scoring):
    return logits.new_empty(logits.shape)


def _refuse(ctx, *grads):
    raise NotImplementedError("balance_loss has no second derivative")


_gradient_op = define_op(
    "balance_loss_backward",
    "(Tensor losses_grad, Tensor logits, Tensor fractions, Tensor? cu_seqlens, str scoring) -> Tensor",
    cpu=cpu.balance_loss_backward,
    device=_launch_gradient,
    fake=_fake_gradient,
    autograd=(lambda ctx, inputs, output: None, _refuse),
)


def _save_for_backward(ctx, inputs, output):
    logits, _, cu_seqlens, ctx.scoring, *_ = inputs
    ctx.save_for_backward(logits, output[1], cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, losses_grad, fractions_grad):
    return _gradient_op(losses_grad, *ctx.saved_tensors, ctx.scoring), *(None,) * 6


_op = define_op(
    "balance_loss",
    "(Tensor logits, Tensor ids, Tensor? cu_seqlens=None, str scoring='sigmoid', int num_shared=0, "
    "bool divide_by_top_k=True, float coefficient=1.0) -> (Tensor, Tensor)",
    cpu=cpu.balance_loss,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
    autograd=(_save_for_backward, _backward),
)


def balance_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    scoring: str = "sigmoid",
    cu_seqlens: torch.Tensor | None = None,
    num_shared: int = 0,
    divide_by_top_k: bool = True,
    coefficient: float = 1.0,
) -> torch.Tensor:
    """The auxiliary loss that evens out the experts' load, ``coefficient * sum over experts of f P``.

    Of each sequence, or of all tokens together without ``cu_seqlens``::

        f[e] = E / (K * tokens) * how many of its ids are e
        P[e] = mean over its tokens of score[e] / sum of the token's scores

    With ``cu_seqlens`` this is DeepSeek-V3's loss (arXiv 2412.19437, 2.1.2, equations 17 to 20) for "sigmoid" and
    DeepSeek-V2's (arXiv 2405.04434, 2.2.3, its expert-level loss) for "softmax"; the result is the mean over sequences.
    Equation 18 counts the experts of the largest scores, without bias: route without one to follow it to the letter.
    Without ``cu_seqlens``, with "softmax" and ``divide_by_top_k=False`` it is Switch Transformers' (arXiv 2101.03961,
    equations 4 to 6) as Hugging Face's ``load_balancing_loss_func`` has it. An even load gives ``coefficient``.

    Differentiable in ``logits`` through P; f is a constant. Two launches, one for the gradient.

    Args:
        logits: [T, E] bf16, fp16 or fp32, contiguous rows; computed in fp32. E is 1 to 1024.
        ids: [T, K + S] int32 from :func:`route`. Ids outside 0 .. E - 1 are not counted.
        scoring: "sigmoid", "softmax" or "sqrt_softplus", as :func:`route`.
        cu_seqlens: [N + 1] int32; sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1. The loss of a sequence
            without tokens is 0; tokens of no sequence take no part. None: all tokens are one sequence.
        num_shared: S, how many slots at the end of ids belong to shared experts; they are not counted.
        divide_by_top_k: False leaves K out of f, which makes the loss K times as large.
        coefficient: factor of the loss, the papers' alpha.

    Returns:
        A scalar, fp32. A NaN logit has probability 0 and no gradient.

    Raises:
        ValueError: a wrong rank or shape, an unknown scoring; on CPU tensors also cu_seqlens that fall or leave the
            tokens. TypeError: a wrong dtype.
    """
    check_tensor("logits", logits, rank=2, dtypes=FLOATS)
    tokens, experts = logits.shape
    check_int("number of experts (logits.shape[1])", experts, 1, 1024)
    check_tensor("ids", ids, shape=(tokens, None), dtypes=(torch.int32,), device=logits.device)
    check_int("num_shared", num_shared, 0)
    check_int("top_k (ids.shape[1] - num_shared)", ids.shape[1] - num_shared, 1, 1024)
    check_choice("scoring", scoring, SCORINGS)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, rank=1, dtypes=(torch.int32,), device=logits.device)
        check_int("number of sequences (cu_seqlens.shape[0] - 1)", cu_seqlens.shape[0] - 1, 1)
    losses, _ = _op(
        logits, ids, cu_seqlens, scoring, num_shared, bool(divide_by_top_k), float(coefficient)
    )  # fmt: skip
    return losses[0] if cu_seqlens is None else losses.mean()
