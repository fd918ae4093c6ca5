"""route: which experts a token goes to, and with what weights.

Symbols: T tokens, E experts, K = top_k. Experts stand in runs of E / num_groups neighbours, the groups.
"""

import torch

from mla_kernels.checks import FLOATS, check_choice, check_int, check_no_grad, check_tensor
from mla_kernels.cpu import route as cpu
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

NEVER = tl.constexpr(-1.0e30)  # choice of an expert that may not be chosen; a chosen one falls to -inf, below it
NO_INDEX = tl.constexpr(1.0e9)  # above every expert and group number


@triton.jit
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
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One item routes BLOCK_T tokens. The best of a row is found as its maximum, then as the lowest index that holds
    it: argmax does not compile for every target, and this order of ties is the contract. Indices are fp32 (exact),
    because integer compares are scalar on some targets."""
    GROUP_SIZE: tl.constexpr = EXPERTS // GROUPS
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_T)
    expert_f = expert.to(tl.float32)
    slot_f = slot.to(tl.float32)
    real = expert_f < EXPERTS  # [BLOCK_E]
    for item in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        first = tl.cast(item * BLOCK_T, tl.int64)
        in_range = (lane < tokens - item * BLOCK_T)[:, None]
        rows = logits + first * logits_stride + lane[:, None] * logits_stride
        x = tl.load(rows + expert[None, :], mask=in_range & (expert < EXPERTS)[None, :], other=float("-inf"))
        x = x.to(tl.float32)  # [BLOCK_T, BLOCK_E]
        present = (x == x) & real[None, :]
        if SOFTMAX:
            x = tl.where(present, x, float("-inf"))
            power = tl.exp(x - tl.max(x, 1)[:, None])
            scores = power / tl.sum(power, 1)[:, None]
        else:
            scores = 1.0 / (1.0 + tl.exp(-x))
        choice = scores
        if HAS_BIAS:
            choice = choice + tl.load(bias + expert, mask=expert < EXPERTS, other=0.0)[None, :]
        choice = tl.where(present & (choice == choice), choice, NEVER)
        choice = tl.where(real[None, :], tl.maximum(choice, NEVER), float("-inf"))  # [BLOCK_T, BLOCK_E]

        if TOP_GROUPS < GROUPS:
            rank = tl.full([BLOCK_T, BLOCK_E], float("-inf"), tl.float32)  # of the group that an expert belongs to
            group = tl.zeros([BLOCK_E], tl.float32)
            for g in range(GROUPS):
                member = ((expert_f >= g * GROUP_SIZE) & (expert_f < (g + 1) * GROUP_SIZE))[None, :]
                own = tl.where(member, choice, float("-inf"))
                best = tl.max(own, 1)
                if (not SOFTMAX) and (GROUP_SIZE > 1):
                    leader = tl.min(tl.where(own == best[:, None], expert_f[None, :], NO_INDEX), 1)
                    second = tl.max(tl.where(expert_f[None, :] == leader[:, None], float("-inf"), own), 1)
                    best = tl.maximum(best + second, NEVER)
                rank = tl.where(member, best[:, None], rank)
                group += tl.where(expert_f >= (g + 1) * GROUP_SIZE, 1.0, 0.0)
            kept = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
            for _ in range(TOP_GROUPS):
                top = tl.max(rank, 1)
                picked = tl.min(tl.where(rank == top[:, None], group[None, :], NO_INDEX), 1)
                hit = group[None, :] == picked[:, None]
                kept = tl.where(hit, 1.0, kept)
                rank = tl.where(hit, float("-inf"), rank)
            if SOFTMAX:
                choice = tl.where((kept > 0.5) | (choice <= NEVER), choice, 0.0)
                scores = tl.where(kept > 0.5, scores, 0.0)
            else:
                choice = tl.where((kept > 0.5) | (choice <= NEVER), choice, NEVER)

        weight = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        chosen = tl.full([BLOCK_T, BLOCK_K], -1.0, tl.float32)
        for k in range(TOP_K):
            top = tl.max(choice, 1)
            picked = tl.min(tl.where(choice == top[:, None], expert_f[None, :], NO_INDEX), 1)
            hit = expert_f[None, :] == picked[:, None]
            score = tl.sum(tl.where(hit, scores, 0.0), 1)  # [BLOCK_T]
            here = (slot_f == k)[None, :]
            found = top > NEVER
            weight = tl.where(here, tl.where(found, score, 0.0)[:, None], weight)
            chosen = tl.where(here, tl.where(found, picked, -1.0)[:, None], chosen)
            choice = tl.where(hit, float("-inf"), choice)
        if RENORMALIZE:
            weight = weight / (tl.sum(weight, 1)[:, None] + 1.0e-20)
        out = first * TOP_K + lane[:, None] * TOP_K + slot[None, :]
        inside = in_range & (slot < TOP_K)[None, :]
        tl.store(weights + out, weight * routed_scale, mask=inside)  # [BLOCK_T, BLOCK_K]
        tl.store(ids + out, chosen.to(tl.int32), mask=inside)


def _rule(chip, dtype, statics, sizes):
    """About 1024 scores a program on GPUs; on Ascend what the dozen live rows of a token leave room for in UB."""
    block_t = max(1, (1024 if chip.is_gpu else 2048) // statics["BLOCK_E"])
    return {"BLOCK_T": min(block_t, 1 << (sizes["tokens"] - 1).bit_length()), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    tile_bytes = tile["BLOCK_T"] * statics["BLOCK_E"] * 4
    return {"shared": 4 * tile["num_warps"] * tile["BLOCK_T"] * 4} if chip.is_gpu else {"UB": 20 * tile_bytes}


def _cost(dtype, statics, sizes):
    tokens, experts, top_k = sizes["tokens"], statics["EXPERTS"], statics["TOP_K"]
    passes = 8 + 4 * top_k + (8 * statics["GROUPS"] if statics["TOP_GROUPS"] < statics["GROUPS"] else 0)
    read = tokens * experts * DTYPE_BYTES[dtype] + 4 * experts * statics["HAS_BIAS"]
    return Cost(flops=tokens * experts * passes, bytes=read + 8 * tokens * top_k)


def _work(dtype, statics, sizes, tile):
    programs = -(-sizes["tokens"] // tile["BLOCK_T"])
    whole = _cost(dtype, statics, sizes)
    padding = statics["BLOCK_E"] / statics["EXPERTS"] * programs * tile["BLOCK_T"] / max(sizes["tokens"], 1)
    bias = 4 * statics["EXPERTS"] * statics["HAS_BIAS"]
    return Work(programs, padding * whole.flops / max(programs, 1), (whole.bytes - bias) / max(programs, 1) + bias)


def _statics(experts, top_k, groups, top_groups, softmax, has_bias, renormalize):
    return {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "GROUPS": groups,
        "TOP_GROUPS": top_groups,
        "SOFTMAX": softmax,
        "HAS_BIAS": has_bias,
        "RENORMALIZE": renormalize,
        "BLOCK_E": max(16, 1 << (experts - 1).bit_length()),  # reductions narrower than 8 lose lanes on Ascend
        "BLOCK_K": max(8, 1 << (top_k - 1).bit_length()),
    }


ROUTE = Kernel(
    route_kernel,
    arguments={
        "logits": "*T",
        "bias": "*fp32",
        "weights": "*fp32",
        "ids": "*i32",
        "tokens": "i32",
        "logits_stride": "i32:16",
        "routed_scale": "fp32",
    },
    statics=tuple(_statics(8, 1, 1, 1, True, False, False)),
    tiles={"BLOCK_T": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=tuple(
        Case(f"{model}_{tokens}", _statics(*constants), {"tokens": tokens})
        for model, constants in {
            "v2_lite": (64, 6, 1, 1, True, False, False),
            "v2": (160, 6, 8, 3, True, False, False),
            "v3": (256, 8, 8, 4, False, True, True),
        }.items()
        for tokens in (1, 256, 4096)
    ),
    uses_dot=False,
)


def _outputs(logits, top_k):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _launch(logits, bias, top_k, scoring, num_groups, top_k_groups, renormalize, routed_scale):
    tokens, experts = logits.shape
    weights, ids = _outputs(logits, top_k)
    statics = _statics(
        experts, top_k, num_groups, top_k_groups, scoring == "softmax", bias is not None, renormalize
    )  # fmt: skip
    chip = chip_of(logits.device)
    tile = ROUTE.tile_for(chip, DTYPE_NAMES[logits.dtype], statics, {"tokens": tokens})
    args = (logits, weights if bias is None else bias, weights, ids, tokens, logits.stride(0), routed_scale)
    ROUTE.launch(chip, -(-tokens // tile["BLOCK_T"]), args, statics, tile)
    return weights, ids


def _fake(logits, bias, top_k, scoring, num_groups, top_k_groups, renormalize, routed_scale):
    return _outputs(logits, top_k)


_op = define_op(
    "route",
    "(Tensor logits, Tensor? bias, int top_k, str scoring, int num_groups, int top_k_groups, bool renormalize, "
    "float routed_scale) -> (Tensor, Tensor)",
    cpu=cpu.route,
    device=_launch,
    fake=_fake,
)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    num_groups: int = 1,
    top_k_groups: int = 1,
    renormalize: bool = True,
    routed_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for every token, and their weights.

    DeepSeek-V2 (arXiv 2405.04434, 2.1.2 and 2.2) is ``scoring="softmax", renormalize=False``; DeepSeek-V3 (arXiv
    2412.19437, 2.1.2; "noaux_tc" in Hugging Face) is ``scoring="sigmoid"`` with a bias. One kernel launch.

    ========= =============== ============= ======================= =======================
    scoring   scores          chosen by     rank of a group         outside the kept groups
    ========= =============== ============= ======================= =======================
    softmax   softmax(logits) scores        largest score           score 0
    sigmoid   sigmoid(logits) scores + bias sum of its two largest  never chosen
    ========= =============== ============= ======================= =======================

    Args:
        logits: [T, E] bf16, fp16 or fp32, contiguous rows; computed in fp32. E is 1 to 1024.
        top_k: experts a token.
        bias: [E] fp32, with "sigmoid" only; steers the choice, never enters the weights.
        num_groups: groups of E / num_groups neighbouring experts each.
        top_k_groups: groups that a token may use.
        renormalize: divide the weights of a token by their sum + 1e-20.
        routed_scale: factor of every weight.

    Returns:
        weights [T, top_k] fp32 and ids [T, top_k] int32, best choice first. Equal values, of groups and of experts, go
        to the lowest number. A NaN logit is never chosen and takes no part in a softmax; a slot for which nothing is
        left has id -1, which later stages skip, and weight 0.

    Raises:
        ValueError: a wrong rank or shape, top_k > E, groups that do not divide E, a bias with "softmax".
        TypeError: a wrong dtype. NotImplementedError: an input that requires grad.
    """
    check_tensor("logits", logits, rank=2, dtypes=FLOATS)
    experts = logits.shape[1]
    check_int("number of experts (logits.shape[1])", experts, 1, 1024)
    check_int("top_k", top_k, 1, experts)
    check_choice("scoring", scoring, ("sigmoid", "softmax"))
    check_int("num_groups", num_groups, 1, experts)
    if experts % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, a divisor of the number of experts, {experts}, is accepted")
    check_int("top_k_groups", top_k_groups, 1, num_groups)
    if bias is not None:
        if scoring == "softmax":
            raise ValueError("bias: got a tensor with scoring 'softmax', None is accepted there (or scoring 'sigmoid')")
        check_tensor("bias", bias, shape=(experts,), dtypes=(torch.float32,), device=logits.device)
    check_no_grad("route", logits=logits, bias=bias)
    return _op(logits, bias, top_k, scoring, num_groups, top_k_groups, bool(renormalize), float(routed_scale))
