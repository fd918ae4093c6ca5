"""align_blocks: pairs in vLLM's and SGLang's layout of padded blocks, without waiting for the device.

Symbols: T tokens, K slots of a token, P = T * K pairs (pair = token * K + slot), E experts, L blocks.
"""

import torch

from mla_kernels.checks import check_int
from mla_kernels.cpu import permute as cpu
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.dispatch.dispatch import MAX_PAIRS, check_ids, launch_order
from mla_kernels.moe.experts.grouped import block_e
from mla_kernels.shim import define_op


@triton.jit
def moe_align_kernel(
    order, offsets, sorted_ids, expert_ids, used, pairs, experts, block_size, blocks,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Item e writes e's blocks, behind those of lower experts; item ``experts`` fills the rest and says how many are in
    use."""
    lane = tl.arange(0, BLOCK_P)
    e = tl.arange(0, BLOCK_E)
    for expert in range(tl.program_id(0), experts + 1, tl.num_programs(0)):
        lower = (e < expert) & (e < experts)
        start = tl.load(offsets + e, mask=e < experts, other=0)
        end = tl.load(offsets + 1 + e, mask=e < experts, other=0)
        wanted = (end - start + (block_size - 1)) // block_size  # [BLOCK_E]
        first = tl.sum(tl.where(lower, wanted, 0).to(tl.float32), 0).to(tl.int32)
        begin = tl.load(offsets + tl.minimum(expert, experts - 1))
        rows = tl.load(offsets + tl.minimum(expert, experts - 1) + 1) - begin
        count = (rows + block_size - 1) // block_size
        if expert == experts:
            rows = 0
            count = blocks - first
            tl.store(used, first * block_size)
        label = tl.where(expert == experts, -1, expert)
        for chunk in range(0, count, BLOCK_P):
            tl.store(
                expert_ids + first + chunk + lane, tl.zeros([BLOCK_P], tl.int32) + label, mask=lane < count - chunk
            )
        places = count * block_size
        for chunk in range(0, places, BLOCK_P):
            pair = tl.load(order + begin + chunk + lane, mask=lane < rows - chunk, other=0)
            pair = tl.where(lane < rows - chunk, pair, pairs)
            tl.store(sorted_ids + first * block_size + chunk + lane, pair, mask=lane < places - chunk)


def _rule(chip, dtype, statics, sizes):
    rows = -(-sizes["pairs"] // sizes["experts"])
    return {"BLOCK_P": min(1024 if chip.is_gpu else 512, max(64, 1 << (rows - 1).bit_length())), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    if chip.is_gpu:
        return {"shared": 4 * 32 * tile["num_warps"]}
    return {"UB": 40 * tile["BLOCK_P"] + 64 * statics["BLOCK_E"]}


def _cost(dtype, statics, sizes):
    return Cost(flops=0, bytes=4.0 * (2 * sizes["pairs"] + 2 * sizes["experts"]))


def _work(dtype, statics, sizes, tile):
    experts = sizes["experts"]
    return Work(experts + 1, 4.0 * statics["BLOCK_E"], 8.0 * sizes["pairs"] / experts + 8 * experts)


ALIGN = Kernel(
    moe_align_kernel,
    arguments={
        **dict.fromkeys(("order", "offsets", "sorted_ids", "expert_ids", "used"), "*i32"),
        **dict.fromkeys(("pairs", "experts", "block_size", "blocks"), "i32"),
    },
    statics=("BLOCK_E",),
    tiles={"BLOCK_P": (64, 128, 256, 512, 1024), "num_warps": (1, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=tuple(
        Case(f"{model}_4096", {"BLOCK_E": experts}, {"pairs": 4096 * top_k, "experts": experts}, ("bf16",))
        for model, top_k, experts in (("v2_lite", 6, 64), ("v3", 8, 256))  # no element type enters
    ),
    uses_dot=False,
)


def _outputs(ids, num_experts, block_size):
    pairs = ids.shape[0] * ids.shape[1]
    blocks = torch.sym_min(pairs, (pairs + num_experts * (block_size - 1)) // block_size)
    return ids.new_empty(blocks * block_size), ids.new_empty(blocks), ids.new_empty(1)


def _launch(ids, num_experts, block_size):
    """Two launches: the order, then the blocks."""
    order, offsets = launch_order(ids, num_experts)
    sorted_ids, expert_ids, used = _outputs(ids, num_experts, block_size)
    pairs = order.shape[0]
    chip, statics = chip_of(ids.device), {"BLOCK_E": block_e(num_experts)}
    tile = ALIGN.tile_for(chip, "bf16", statics, {"pairs": pairs, "experts": num_experts})
    args = (order, offsets, sorted_ids, expert_ids, used, pairs, num_experts, block_size, expert_ids.shape[0])
    ALIGN.launch(chip, num_experts + 1, args, statics, tile)
    return sorted_ids, expert_ids, used


_op = define_op(
    "align_blocks",
    "(Tensor ids, int num_experts, int block_size) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.align_blocks,
    device=_launch,
    fake=_outputs,
)


def align_blocks(
    ids: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, each expert's filled up to whole blocks: the layout that vLLM's and SGLang's grouped
    kernels take. Two kernel launches; sizes are those of the worst case, so that nothing is read back.

    Args:
        ids: [T, K] int32, the expert of each pair. One below 0 or from ``num_experts`` up puts its pair in no
            block.
        num_experts: E, 1 to 1024.
        block_size: pairs of a block, 1 to 1024.

    Returns:
        int32 tensors, with L = min(P, (P + E * (block_size - 1)) // block_size) blocks, the most that any ids need:

        - sorted_token_ids [L * block_size]: pairs (token * K + slot) block by block, those of an expert in their order;
          P = T * K where a block is not filled, and behind the last block in use
        - expert_ids [L]: the expert of each block; -1 behind the last block in use
        - num_tokens_post_padded [1]: block_size times the number of blocks in use

    Example with 3 experts and blocks of 2: ids [[2, 0], [0, -1], [2, 2]] has pairs 1, 2 at expert 0, none at expert 1
    and 0, 4, 5 at expert 2: sorted_token_ids [1, 2, 0, 4, 5, 6, 6, 6], expert_ids [0, 2, 2, -1],
    num_tokens_post_padded [6].

    Raises:
        TypeError: ids is not an int32 tensor. ValueError: a wrong rank, num_experts or block_size out of range, 2^24
        pairs or more, or a result of 2^31 elements or more.
    """
    check_ids(ids)
    check_int("num_experts", num_experts, 1, 1024)
    check_int("block_size", block_size, 1, 1024)
    pairs = ids.shape[0] * ids.shape[1]
    if pairs + num_experts * block_size >= MAX_PAIRS * 2:
        raise ValueError(f"ids: got {pairs} pairs, fewer than {2 * MAX_PAIRS - num_experts * block_size} are accepted")
    return _op(ids, num_experts, block_size)
