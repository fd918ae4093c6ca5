"""route: which experts a token goes to, and with what weights.

Symbols: T tokens, E experts, K = top_k, S = num_shared. Experts stand in runs of E / num_groups neighbours, the groups.
"""

import torch

from mla_kernels.checks import check_choice, check_int, check_no_grad, check_tensor
from mla_kernels.cpu import route as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import wanted
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.route.backward import route_backward, save_for_backward
from mla_kernels.moe.route.scores import (
    MAX_STRIDE,
    SCORINGS,
    finished_slots,
    near_rows,
    router_scores,
    router_tiles,
)
from mla_kernels.shim import define_op

NEVER = tl.constexpr(-1.0e30)  # choice of an expert that may not be chosen; a chosen one falls to -inf, below it
NO_INDEX = tl.constexpr(1 << 24)  # above every expert and group number, and exact in fp32


@triton.jit
def to_keys(x, INTEGERS: tl.constexpr):
    """Numbers that stand in the order of the fp32 ``x``, which are not NaN and not -0.0: themselves, or int32."""
    if INTEGERS:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    else:
        return x


@triton.jit
def from_keys(keys, INTEGERS: tl.constexpr):
    if INTEGERS:
        return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)
    else:
        return keys


@triton.jit
def lowest_keys(SHAPE: tl.constexpr, INTEGERS: tl.constexpr):
    """Keys of -inf."""
    return to_keys(tl.full(SHAPE, float("-inf"), tl.float32), INTEGERS)


@triton.jit
def first_holder(keys, top, index, AXIS: tl.constexpr):
    """The lowest ``index`` along AXIS whose key is ``top``."""
    return tl.min(tl.where(keys == tl.expand_dims(top, AXIS), index, NO_INDEX), AXIS)


@triton.jit
def group_ranks(own, index, TWO: tl.constexpr, INTEGERS: tl.constexpr, AXIS: tl.constexpr):
    """A group's rank, fp32: the best of its keys along AXIS, or the sum of the best two."""
    best = tl.max(own, AXIS)
    rank = from_keys(best, INTEGERS)
    if TWO:
        leader = first_holder(own, best, index, AXIS)
        others = tl.where(index == tl.expand_dims(leader, AXIS), lowest_keys(own.shape, INTEGERS), own)
        rank = tl.maximum(rank + from_keys(tl.max(others, AXIS), INTEGERS), NEVER)
    return rank


@triton.jit
def best_groups(rank, group, TOP_GROUPS: tl.constexpr, INTEGERS: tl.constexpr):
    """1 where ``rank`` [rows, n] belongs to one of the TOP_GROUPS best of the groups whose numbers ``group`` has."""
    keys = to_keys(rank, INTEGERS)
    kept = tl.zeros(rank.shape, tl.float32)
    for _ in range(TOP_GROUPS):
        picked = first_holder(keys, tl.max(keys, 1), group, 1)
        hit = group == picked[:, None]
        kept = tl.where(hit, 1.0, kept)
        keys = tl.where(hit, lowest_keys(rank.shape, INTEGERS), keys)
    return kept


@triton.jit(
    do_not_specialize=["tokens", "logits_stride"],
    do_not_specialize_on_alignment=["logits", "bias", "weights", "ids"],
)
def route_kernel(
    logits,
    bias,
    weights,
    ids,
    tokens,
    logits_stride,
    routed_scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORING: tl.constexpr,
    TOP2_RANK: tl.constexpr,
    GROUP_FILL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    """One item routes BLOCK_T tokens. The best of a row is found as its maximum, then as the lowest index that holds
    it: argmax does not compile for every target, and this order of ties is the contract. With INTEGERS what is compared
    are int32, which a warp of an NVIDIA GPU reduces in one instruction (redux.sync); else fp32, exact indices too,
    because integer compares are scalar on Ascend."""
    GROUP_SIZE: tl.constexpr = EXPERTS // GROUPS
    TWO: tl.constexpr = TOP2_RANK and GROUP_SIZE > 1
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_T)
    expert_f = expert.to(tl.float32)
    slot_f = slot.to(tl.float32)
    index = (expert if INTEGERS else expert_f)[None, :]
    real = expert_f < EXPERTS  # [BLOCK_E]
    for item in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        first = tl.cast(item * BLOCK_T, tl.int64)
        in_range = (lane < tokens - item * BLOCK_T)[:, None]
        rows = logits + first * logits_stride + lane[:, None] * logits_stride
        x = tl.load(rows + expert[None, :], mask=in_range & (expert < EXPERTS)[None, :], other=float("-inf"))
        x = x.to(tl.float32)  # [BLOCK_T, BLOCK_E]
        present = (x == x) & real[None, :]
        scores = router_scores(x, present, SCORING)
        choice = scores
        if HAS_BIAS:
            choice = choice + tl.load(bias + expert, mask=expert < EXPERTS, other=0.0)[None, :]
        choice = tl.where(present & (choice == choice), choice, NEVER)
        choice = tl.where(real[None, :], tl.maximum(choice, NEVER), float("-inf"))  # [BLOCK_T, BLOCK_E]

        if TOP_GROUPS < GROUPS:
            keys = to_keys(choice, INTEGERS)
            if GROUPS * GROUP_SIZE == BLOCK_E:  # all groups at once
                split: tl.constexpr = [BLOCK_T, GROUPS, GROUP_SIZE]
                numbers = tl.reshape(index, [1, GROUPS, GROUP_SIZE])
                rank = group_ranks(tl.reshape(keys, split), numbers, TWO, INTEGERS, 2)  # [BLOCK_T, GROUPS]
                group = tl.arange(0, GROUPS)[None, :]
                kept = best_groups(rank, group if INTEGERS else group.to(tl.float32), TOP_GROUPS, INTEGERS)
                kept = tl.reshape(tl.broadcast_to(kept[:, :, None], split), [BLOCK_T, BLOCK_E])
            else:
                rank = tl.full([BLOCK_T, BLOCK_E], float("-inf"), tl.float32)  # of the group that an expert belongs to
                group = tl.zeros([1, BLOCK_E], index.dtype)
                for g in range(GROUPS):
                    member = ((expert_f >= g * GROUP_SIZE) & (expert_f < (g + 1) * GROUP_SIZE))[None, :]
                    own = tl.where(member, keys, lowest_keys([BLOCK_T, BLOCK_E], INTEGERS))
                    rank = tl.where(member, group_ranks(own, index, TWO, INTEGERS, 1)[:, None], rank)
                    group += tl.where(expert_f >= (g + 1) * GROUP_SIZE, 1, 0).to(index.dtype)[None, :]
                kept = best_groups(rank, group, TOP_GROUPS, INTEGERS)  # [BLOCK_T, BLOCK_E]
            if GROUP_FILL == "never":
                choice = tl.where((kept > 0.5) | (choice <= NEVER), choice, NEVER)
            else:
                choice = tl.where((kept > 0.5) | (choice <= NEVER), choice, 0.0)
            if GROUP_FILL == "zero_score":
                scores = tl.where(kept > 0.5, scores, 0.0)

        weight = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        chosen = tl.full([BLOCK_T, BLOCK_K], -1.0, tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        keys = to_keys(choice, INTEGERS)
        held = scores.to(tl.int32, bitcast=True) if INTEGERS else scores
        for k in range(TOP_K):
            top = tl.max(keys, 1)
            picked = first_holder(keys, top, index, 1)
            hit = index == picked[:, None]
            score = from_keys(top, INTEGERS)  # [BLOCK_T]
            found = score > NEVER
            if HAS_BIAS or (GROUP_FILL == "zero"):
                score = tl.sum(tl.where(hit, held, 0), 1).to(tl.float32, bitcast=True)  # one of them is not zero
            here = (slot_f == k)[None, :]
            score = tl.where(found, score, 0.0)
            total += score
            weight = tl.where(here, score[:, None], weight)
            chosen = tl.where(here, tl.where(found, picked, -1).to(tl.float32)[:, None], chosen)
            keys = tl.where(hit, lowest_keys([BLOCK_T, BLOCK_E], INTEGERS), keys)
        weight, chosen = finished_slots(
            weight, total, chosen, slot_f, routed_scale, EXPERTS, TOP_K, SHARED, RENORMALIZE
        )
        out = first * (TOP_K + SHARED) + lane[:, None] * (TOP_K + SHARED) + slot[None, :]
        inside = in_range & (slot < TOP_K + SHARED)[None, :]
        tl.store(weights + out, weight, mask=inside)  # [BLOCK_T, BLOCK_K]
        tl.store(ids + out, chosen.to(tl.int32), mask=inside)


def _cost(dtype, statics, sizes):
    tokens, experts, top_k = sizes["tokens"], statics["EXPERTS"], statics["TOP_K"]
    passes = 8 + 4 * top_k + (8 * statics["GROUPS"] if statics["TOP_GROUPS"] < statics["GROUPS"] else 0)
    read = tokens * experts * DTYPE_BYTES[dtype] + 4 * experts * statics["HAS_BIAS"]
    return Cost(flops=tokens * experts * passes, bytes=read + 8 * tokens * (top_k + statics["SHARED"]))


def _work(dtype, statics, sizes, tile):
    programs = -(-sizes["tokens"] // tile["BLOCK_T"])
    whole = _cost(dtype, statics, sizes)
    padding = statics["BLOCK_E"] / statics["EXPERTS"] * programs * tile["BLOCK_T"] / max(sizes["tokens"], 1)
    bias = 4 * statics["EXPERTS"] * statics["HAS_BIAS"]
    return Work(programs, padding * whole.flops / max(programs, 1), (whole.bytes - bias) / max(programs, 1) + bias)


def _statics(
    experts,
    top_k,
    *,
    scoring="sigmoid",
    groups=1,
    top_groups=1,
    rank=None,
    fill=None,
    has_bias=False,
    renormalize=True,
    shared=0,
):
    """Constants of the kernel; options of groups that change nothing take their first value, so that they compile
    nothing."""
    grouped, softmax = top_groups < groups, scoring == "softmax"
    fills = {0.0: "zero", float("-inf"): "never", None: "zero_score" if softmax else "never"}
    return {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "SHARED": shared,
        "GROUPS": groups if grouped else 1,
        "TOP_GROUPS": top_groups if grouped else 1,
        "SCORING": scoring,
        "TOP2_RANK": grouped and (not softmax if rank is None else rank == "top2_sum"),
        "GROUP_FILL": fills[fill] if grouped else "never",
        "HAS_BIAS": has_bias,
        "RENORMALIZE": renormalize,
        "BLOCK_E": max(16, 1 << (experts - 1).bit_length()),  # reductions narrower than 8 lose lanes on Ascend
        "BLOCK_K": max(8, 1 << (top_k + shared - 1).bit_length()),
    }


_V3 = {"groups": 8, "top_groups": 4, "has_bias": True}
_MODELS = {
    "v2_lite": _statics(64, 6, scoring="softmax", renormalize=False),
    "v2": _statics(160, 6, scoring="softmax", groups=8, top_groups=3, renormalize=False),
    "v3": _statics(256, 8, **_V3),
    "v4": _statics(384, 6, scoring="sqrt_softplus", has_bias=True, shared=1),
}

_ROWS = router_tiles(2048)


def _rule(chip, dtype, statics, sizes):
    return _ROWS["rule"](chip, dtype, statics, sizes) | {"INTEGERS": int(chip.vendor == "nvidia")}


def _memory(chip, dtype, statics, tile):
    """As for every router; the other form of comparison counts as too large."""
    need = _ROWS["memory"](chip, dtype, statics, tile)
    if tile["INTEGERS"] != _rule(chip, dtype, statics, {})["INTEGERS"]:
        return {space: chip.memory[space] + 1 for space in need}
    return need


ROUTE = Kernel(
    route_kernel,
    arguments={
        "logits": "*T",
        "bias": "*fp32",
        "weights": "*fp32",
        "ids": "*i32",
        "tokens": "i32",
        "logits_stride": "i32",
        "routed_scale": "fp32",
    },
    statics=tuple(_statics(8, 1)),
    tiles=_ROWS["tiles"] | {"INTEGERS": (0, 1)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=tuple(
        Case(f"{model}_{tokens}", statics, {"tokens": tokens})
        for model, statics in _MODELS.items()
        for tokens in (1, 256, 4096)
    ),
    uses_dot=False,
)


def _outputs(logits, top_k, num_shared):
    shape = (logits.shape[0], top_k + num_shared)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _launch(
    logits, bias, top_k, scoring, num_groups, top_k_groups, group_rank, group_fill, renormalize, routed_scale,
    num_shared, batch_invariant=False,
):  # fmt: skip
    """One instance of the kernel, a row a program, serves every number of tokens: see router_tiles."""
    (tokens, experts), chip = logits.shape, chip_of(logits.device)
    weights, ids = _outputs(logits, top_k, num_shared)
    options = experts, top_k, scoring, num_groups, top_k_groups, group_rank, group_fill, renormalize, num_shared
    key = chip.device, logits.dtype, tokens, options, bias is None
    plan = ROUTE.kept.plans.get(key)
    if plan is None:
        statics = _statics(
            experts, top_k, scoring=scoring, groups=num_groups, top_groups=top_k_groups, rank=group_rank,
            fill=group_fill, has_bias=bias is not None, renormalize=renormalize, shared=num_shared,
        )  # fmt: skip
        tile = ROUTE.tile_for(chip, DTYPE_NAMES[logits.dtype], statics, {"tokens": tokens})
        plan = ROUTE.keep(key, (-(-tokens // tile["BLOCK_T"]), statics, tile))
    work, statics, tile = plan
    if logits.stride()[0] > MAX_STRIDE:
        logits = near_rows(logits)
    args = (logits, weights if bias is None else bias, weights, ids, tokens, logits.stride()[0], routed_scale)
    ROUTE.launch(chip, work, args, statics, tile)
    return weights, ids


def _fake(
    logits, bias, top_k, scoring, num_groups, top_k_groups, group_rank, group_fill, renormalize, routed_scale,
    num_shared, *_,
):  # fmt: skip
    return _outputs(logits, top_k, num_shared)


def _save_for_backward(ctx, inputs, output):
    logits, _, _, scoring, *_, renormalize, routed_scale, num_shared, batch_invariant = inputs
    save_for_backward(ctx, logits, output, scoring, renormalize, routed_scale, num_shared, batch_invariant)


def _backward(ctx, weights_grad, ids_grad):
    return route_backward(ctx, weights_grad), *(None,) * 11


_op = define_op(
    "route",
    "(Tensor logits, Tensor? bias, int top_k, str scoring='sigmoid', int num_groups=1, int top_k_groups=1, "
    "str? group_rank=None, float? group_fill=None, bool renormalize=True, float routed_scale=1.0, int num_shared=0, "
    "bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=by_row(cpu.route, 0),
    device=_launch,
    fake=_fake,
    autograd=(_save_for_backward, _backward),
)


_RANKS, _FILLS, _FP32 = (None, "max", "top2_sum"), (None, 0.0, float("-inf")), (torch.float32,)


def _check_options(experts, top_k, scoring, num_groups, top_k_groups, group_rank, group_fill, num_shared) -> None:
    """Refuse options one by one, each by its name."""
    check_int("number of experts (logits.shape[1])", experts, 1, 1024)
    check_int("top_k", top_k, 1, experts)
    check_choice("scoring", scoring, SCORINGS)
    check_int("num_groups", num_groups, 1, experts)
    if experts % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, a divisor of the number of experts, {experts}, is accepted")
    check_int("top_k_groups", top_k_groups, 1, num_groups)
    check_choice("group_rank", group_rank, _RANKS)
    check_choice("group_fill", group_fill, _FILLS)
    check_int("num_shared", num_shared, 0, 1024)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_rank: str | None = None,
    group_fill: float | None = None,
    renormalize: bool = True,
    routed_scale: float = 1.0,
    num_shared: int = 0,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for every token, and their weights. One kernel launch.

    The scores are ``sigmoid(x)``, ``softmax(x)`` or ``sqrt(max(x, 0) + log1p(exp(-|x|)))`` ("sqrt_softplus") of a
    token's logits, in fp32. Experts are chosen by score + bias; weights are scores without bias, divided by their sum +
    1e-20 if ``renormalize``, times ``routed_scale``. With groups, only experts of the ``top_k_groups`` best are chosen.

    ============== ============= ==== ========== ========== ===========
    model          scoring       bias group_rank group_fill renormalize
    ============== ============= ==== ========== ========== ===========
    DeepSeek-V2    softmax       no   max        None       False
    DeepSeek-V3    sigmoid       yes  top2_sum   -inf       True
    DeepSeek-V4    sqrt_softplus yes  no groups  no groups  True
    GLM-4.5, AX-K1 sigmoid       yes  top2_sum   -inf       True
    AX-K2          sigmoid       yes  top2_sum   0.0        True
    Mistral 4      softmax       no   top2_sum   0.0        True
    LongCat-Flash  softmax       yes  no groups  no groups  False
    ============== ============= ==== ========== ========== ===========

    Sources: DeepSeek-V2 (arXiv 2405.04434, 2.1.2 and 2.2), DeepSeek-V3 (arXiv 2412.19437, 2.1.2; "noaux_tc"), and the
    routers of Hugging Face's models of these names.

    Differentiable in ``logits``, through the weights; the choice itself has no gradient. On devices a token's results
    have the same bits in every batch, wherever its logits lie; of CPU tensors weights may differ by an ulp without
    ``batch_invariant``.

    Args:
        logits: [T, E] bf16, fp16 or fp32, contiguous rows; computed in fp32. E is 1 to 1024.
        top_k: experts a token.
        bias: [E] fp32; steers the choice, never enters the weights, and gets no gradient.
        scoring: "sigmoid", "softmax" or "sqrt_softplus".
        num_groups: groups of E / num_groups neighbouring experts each.
        top_k_groups: groups that a token may use.
        group_rank: a group's rank by its largest choice value ("max"; what None means with "softmax") or by the sum of
            its two largest ("top2_sum"; what None means otherwise).
        group_fill: what replaces the choice value of experts outside the kept groups: ``-inf`` (never chosen) or 0.0
            (chosen only where fewer than top_k in the kept groups are above it, then with their own score as weight).
            None: with "softmax" 0.0, and the score becomes 0, too; otherwise ``-inf``.
        renormalize: divide the weights of a token by their sum + 1e-20.
        routed_scale: factor of every weight.
        num_shared: shared experts S: slots for experts E to E + S - 1, with weight 1.0, follow the top_k of each token.
        batch_invariant: whether a token's results must not depend on the others, and their gradient not, either; None:
            as the block :class:`mla_kernels.batch_invariant` says.

    Returns:
        weights [T, top_k + S] fp32 and ids [T, top_k + S] int32, best choice first. Equal values, of groups and of
        experts, go to the lowest number. A NaN logit is never chosen and takes no part in a softmax; a slot for which
        nothing is left has id -1, which later stages skip, and weight 0.

    Raises:
        ValueError: a wrong rank or shape, top_k > E, groups that do not divide E, an unknown option.
        TypeError: a wrong dtype. NotImplementedError: a bias that requires grad.
    """
    check_tensor("logits", logits, rank=2)
    experts = logits.shape[1]
    if not (
        type(top_k) is type(num_groups) is type(top_k_groups) is type(num_shared) is int
        and 1 <= top_k <= experts <= 1024
        and 1 <= top_k_groups <= num_groups
        and 0 <= num_shared <= 1024
        and experts % num_groups == 0
        and scoring in SCORINGS
        and group_rank in _RANKS
        and group_fill in _FILLS
    ):
        _check_options(experts, top_k, scoring, num_groups, top_k_groups, group_rank, group_fill, num_shared)
    if bias is not None:
        check_tensor("bias", bias, shape=(experts,), dtypes=_FP32, device=logits.device)
        if bias.requires_grad:
            check_no_grad("route", bias=bias)
    return _op(
        logits, bias, top_k, scoring, num_groups, top_k_groups, group_rank, group_fill, bool(renormalize),
        float(routed_scale), num_shared, wanted(batch_invariant),
    )  # fmt: skip
