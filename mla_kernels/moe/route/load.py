"""expert_load and update_bias: how many slots chose each expert, and the router's bias that evens it out.

Symbols: T tokens, K slots of a token, P = T * K pairs, E experts.
"""

import torch

from mla_kernels.checks import check_int, check_no_grad, check_tensor
from mla_kernels.cpu import balance as cpu
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

MAX_PAIRS = 1 << 24  # counts are exact in fp32
MAX_EXPERTS = 4096


@triton.jit
def expert_load_kernel(ids, load, pairs, experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """One item counts BLOCK_E experts over all pairs. Ids are compared in fp32, since integer compares are scalar on
    some targets; one that rounds stays far above every expert."""
    lane = tl.arange(0, BLOCK_P)
    for item in range(tl.program_id(0), tl.cdiv(experts, BLOCK_E), tl.num_programs(0)):
        expert = item * BLOCK_E + tl.arange(0, BLOCK_E)
        expert_f = expert.to(tl.float32)[:, None]
        count = tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, pairs, BLOCK_P):
            chosen = tl.load(ids + start + lane, mask=lane < pairs - start, other=-1).to(tl.float32)  # [BLOCK_P]
            chosen = tl.where(lane.to(tl.float32) < pairs - start, chosen, -1.0)
            count += tl.sum(tl.where(chosen[None, :] == expert_f, 1.0, 0.0), 1)
        tl.store(load + expert, count.to(tl.int32), mask=expert < experts)


@triton.jit
def update_bias_kernel(bias, load, experts, speed, BLOCK_E: tl.constexpr):
    """One item moves all. ``sign(mean - load)`` in integers: with total = whole * experts + rest, a load is below the
    mean where it is below whole, or equal to it with a rest."""
    for _ in range(tl.program_id(0), 1, tl.num_programs(0)):
        expert = tl.arange(0, BLOCK_E)
        inside = expert < experts
        count = tl.load(load + expert, mask=inside, other=0)  # [BLOCK_E]
        total = tl.sum(count, 0)
        whole = total // experts
        rest = (total - whole * experts).to(tl.float32)
        beyond = (count - whole).to(tl.float32)  # exact in its sign
        level = tl.where(rest > 0.0, speed, 0.0)
        step = tl.where(beyond > 0.0, -speed, tl.where(beyond < 0.0, speed, level))
        tl.store(bias + expert, tl.load(bias + expert, mask=inside, other=0.0) + step, mask=inside)


def _load_rule(chip, dtype, statics, sizes):
    return {"BLOCK_E": 8, "BLOCK_P": min(512, max(32, 1 << (sizes["pairs"] - 1).bit_length())), "num_warps": 4}


def _load_memory(chip, dtype, statics, tile):
    lanes = tile["BLOCK_E"] * tile["BLOCK_P"]
    return {"shared": 4 * tile["num_warps"] * tile["BLOCK_E"]} if chip.is_gpu else {"UB": 12 * lanes}


def _load_cost(dtype, statics, sizes):
    return Cost(flops=2.0 * sizes["pairs"] * sizes["experts"], bytes=4.0 * (sizes["pairs"] + sizes["experts"]))


def _load_work(dtype, statics, sizes, tile):
    lanes = -(-sizes["pairs"] // tile["BLOCK_P"]) * tile["BLOCK_P"]
    programs = -(-sizes["experts"] // tile["BLOCK_E"])
    return Work(programs, 2.0 * lanes * tile["BLOCK_E"], 4.0 * (sizes["pairs"] + tile["BLOCK_E"]))


EXPERT_LOAD = Kernel(
    expert_load_kernel,
    arguments={"ids": "*i32", "load": "*i32", "pairs": "i32", "experts": "i32"},
    statics=(),
    tiles={"BLOCK_E": (8, 16), "BLOCK_P": (32, 64, 128, 256, 512), "num_warps": (1, 4, 8)},
    rule=_load_rule,
    memory=_load_memory,
    cost=_load_cost,
    work=_load_work,
    cases=(Case("v3_4096", {}, {"pairs": 4096 * 8, "experts": 256}, dtypes=("bf16",)),),  # no element type enters
    uses_dot=False,
)

UPDATE_BIAS = Kernel(
    update_bias_kernel,
    arguments={"bias": "*fp32", "load": "*i32", "experts": "i32", "speed": "fp32"},
    statics=("BLOCK_E",),
    tiles={"num_warps": (1, 4)},
    rule=lambda chip, dtype, statics, sizes: {"num_warps": 4},
    memory=lambda chip, dtype, statics, tile: {"shared": 64} if chip.is_gpu else {"UB": 48 * statics["BLOCK_E"]},
    cost=lambda dtype, statics, sizes: Cost(flops=4.0 * sizes["experts"], bytes=12.0 * sizes["experts"]),
    work=lambda dtype, statics, sizes, tile: Work(1, 4.0 * statics["BLOCK_E"], 12.0 * sizes["experts"]),
    cases=(Case("v3", {"BLOCK_E": 256}, {"experts": 256}, dtypes=("bf16",)),),
    uses_dot=False,
)


def _launch_load(ids, num_experts):
    ids = ids.contiguous()
    load = ids.new_empty(num_experts)
    chip = chip_of(ids.device)
    tile = EXPERT_LOAD.tile_for(chip, "bf16", {}, {"pairs": ids.numel(), "experts": num_experts})
    arguments = (ids, load, ids.numel(), num_experts)
    EXPERT_LOAD.launch(chip, -(-num_experts // tile["BLOCK_E"]), arguments, {}, tile)
    return load


def _launch_update(bias, load, speed):
    experts = bias.shape[0]
    statics = {"BLOCK_E": max(16, 1 << (experts - 1).bit_length())}
    chip = chip_of(bias.device)
    tile = UPDATE_BIAS.tile_for(chip, "bf16", statics, {"experts": experts})
    UPDATE_BIAS.launch(chip, 1, (bias, load, experts, speed), statics, tile)


_expert_load = define_op(
    "expert_load",
    "(Tensor ids, SymInt num_experts) -> Tensor",
    cpu=cpu.expert_load,
    device=_launch_load,
    fake=lambda ids, num_experts: ids.new_empty(num_experts),
)

_update_bias = define_op(
    "update_bias",
    "(Tensor(a!) bias, Tensor load, float speed) -> ()",
    cpu=cpu.update_bias,
    device=_launch_update,
    fake=lambda bias, load, speed: None,
)


def expert_load(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how many (token, slot) pairs go to each expert. One launch.

    ``ids = [[2, 0], [0, -1], [2, 1]]`` with 3 experts gives ``[2, 1, 2]``. To balance over several ranks, sum the
    results of all with ``torch.distributed.all_reduce``.

    Args:
        ids: [T, K] int32, as :func:`route` gives them. An id outside 0 .. num_experts - 1 is counted nowhere, shared
            experts included unless num_experts counts them.
        num_experts: E, 1 to 4096.

    Returns:
        [E] int32.

    Raises:
        ValueError: a wrong rank, 2^24 pairs or more, num_experts out of range. TypeError: a wrong dtype.
    """
    check_tensor("ids", ids, rank=2, dtypes=(torch.int32,))
    check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    check_int("number of pairs (ids.numel())", ids.numel(), 0, MAX_PAIRS - 1)
    return _expert_load(ids, num_experts)


def update_bias(bias: torch.Tensor, load: torch.Tensor, speed: float) -> None:
    """Move a router's bias towards an even load, in place: ``bias += speed * sign(mean(load) - load)``. One launch.

    Balancing without an auxiliary loss (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, 2.1.2, with
    speed 0.001 for most of its training), once after each step. The sign is exact: an expert with the mean load keeps
    its bias.

    Args:
        bias: [E] fp32, the bias given to :func:`route`. E is 1 to 4096.
        load: [E] int32 from :func:`expert_load`, in all below 2^31.
        speed: size of a step.

    Raises:
        ValueError: a wrong shape or device. TypeError: a wrong dtype. NotImplementedError: the bias requires grad.
    """
    check_tensor("bias", bias, rank=1, dtypes=(torch.float32,))
    check_int("number of experts (bias.shape[0])", bias.shape[0], 1, MAX_EXPERTS)
    check_tensor("load", load, shape=tuple(bias.shape), dtypes=(torch.int32,), device=bias.device)
    check_no_grad("update_bias", bias=bias)
    _update_bias(bias, load, float(speed))
