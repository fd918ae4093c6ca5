"""Rows in the order of experts, there and back, and the padded-block layout of vLLM and SGLang.

Symbols: T tokens, K slots of a token, P = T * K pairs (pair = token * K + slot), E experts, H hidden size.
"""

import torch
from einops import rearrange

from mla_kernels.reference.moe import Dispatch, dispatch


def permute(hidden: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """rows [P, H] in expert order: rows[row] = hidden[dispatched.tokens[row]], 0 from row offsets[E] on.

    hidden [T, H], dispatched from `dispatch(ids, E)`.
    """
    has_expert = torch.arange(dispatched.tokens.shape[0], device=hidden.device) < dispatched.offsets[-1]
    return torch.where(has_expert[:, None], hidden[dispatched.tokens.long()], 0.0)


def unpermute(
    rows: torch.Tensor, dispatched: Dispatch, weights: torch.Tensor | None = None, *, top_k: int = 1
) -> torch.Tensor:
    """Each token's sum over its slots of weight * row, [T, H] in rows' dtype.

    rows [P, H] in expert order, dispatched as for `permute`; weights [T, K] fp32, or None for 1, with top_k slots a
    token. A pair without an expert adds 0, and its row is not read.
    """
    if weights is None:
        weights = torch.ones(rows.shape[0] // top_k, top_k, dtype=rows.dtype, device=rows.device)
    row_of = rearrange(dispatched.inverse.long(), "(token slot) -> token slot", slot=weights.shape[1])
    present = (row_of < dispatched.offsets[-1])[:, :, None]
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    values = torch.where(present, rows[row_of].to(wide), 0.0)
    return torch.where(present, values * weights[:, :, None].to(wide), 0.0).sum(1).to(rows.dtype)


def align_blocks(
    ids: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, each expert's filled up to whole blocks, as vLLM's and SGLang's kernels take them.

    ids [T, K] int32. Returns, all int32, with L = the most blocks that any ids could need,
    min(P, (P + E * (block_size - 1)) // block_size):
    sorted_token_ids        [L * block_size]: pairs, block by block; P where a block is not filled, and behind the last
    expert_ids              [L]: the expert of each block, -1 behind the last
    num_tokens_post_padded  [1]: block_size times the number of blocks in use

    Example with 3 experts and blocks of 2: ids [[2, 0], [0, -1], [2, 2]] has pairs 1, 2 at expert 0, none at expert 1
    and 0, 4, 5 at expert 2: sorted_token_ids [1, 2, 0, 4, 5, 6, 6, 6], expert_ids [0, 2, 2, -1],
    num_tokens_post_padded [6]. Pair 3, whose id is no expert's, is in no block.
    """
    order, _, _, offsets = dispatch(ids, num_experts)
    pairs = ids.numel()
    blocks = min(pairs, (pairs + num_experts * (block_size - 1)) // block_size)
    sorted_ids, experts = [], []
    for expert in range(num_experts):
        mine = order[offsets[expert] : offsets[expert + 1]].tolist()
        mine += [pairs] * (-len(mine) % block_size)
        sorted_ids += mine
        experts += [expert] * (len(mine) // block_size)
    used = len(sorted_ids)
    sorted_ids += [pairs] * (blocks * block_size - used)
    experts += [-1] * (blocks - len(experts))
    return tuple(torch.tensor(x, dtype=torch.int32, device=ids.device) for x in (sorted_ids, experts, [used]))
