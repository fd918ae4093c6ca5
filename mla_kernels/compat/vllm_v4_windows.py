"""DeepSeek-V4's compressed entries out of vLLM's paged states of unfinished windows."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

ROWS = 8192
"""States that are gathered at a time, 32 MiB of them with DeepSeek-V4's widths."""


class Finished(NamedTuple):
    """Some tokens, of which each that has a slot is the last of a window."""

    positions: torch.Tensor
    slots: torch.Tensor


def finished_windows(
    states: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    requests: torch.Tensor,
    block_table: torch.Tensor,
    *,
    ratio: int,
    sides: int,
) -> Iterator[tuple[Finished, torch.Tensor]]:
    """Weighted sums of the windows that end with a token of this step, a part at a time.

    Entry of a token at position p: ``sum_j softmax_j(score_j) kv_j`` over the ``sides * ratio`` tokens up to p, for
    each feature by itself, those before position 0 left out. With two sides (CSA) the older ``ratio`` tokens give the
    first half of their values, the newer ones the second. Which tokens end a window is not read back: those with a slot
    come first, and as many entries are made as there can be. With ratio 4 and tokens 2 to 8 of one request, these are
    7 // 4 + 1 = 2, of the windows that end with tokens 3 and 7.

    Args:
        states: ``[pages, page_size, 2 * sides * D]`` float32: a token's kv, then its scores, position bias included.
        positions: ``[tokens or more]`` int64.
        slots: ``[tokens]`` int64, where the entry of a token's window goes; -1: its window is not at its end.
        requests: ``[tokens or more]`` int32, each token's row of the table.
        block_table: ``[requests, columns]`` int32, pages of states; entries of pages that no window reads may be
            anything within ``states``.
        ratio: tokens of a window.
        sides: 2 with overlap, else 1.

    Yields:
        (the tokens, entries ``[n, D]`` float32; those of tokens without a slot are of no meaning).

    Source: vLLM 0.33.0, ``vllm/models/deepseek_v4/common/ops/fused_compress_quant_cache.py``.
    """
    tokens, page_size = slots.shape[0], states.shape[1]
    state = states.unflatten(2, (2, sides, -1))  # [pages, page_size, 2, sides, D]
    most = min(tokens, tokens // ratio + block_table.shape[0])
    first = torch.sort((slots < 0).byte(), stable=True).indices[:most]
    row = torch.arange(sides * ratio, device=slots.device)
    for part in first.split(max(1, ROWS // (sides * ratio))):
        there = positions[part]
        at = there[:, None] + row + 1 - sides * ratio  # [n, sides * ratio]
        seen = at.clamp_min(0)
        page = block_table[requests[part].long()[:, None], seen // page_size].long()
        kv, score = state[page, seen % page_size, :, row // ratio].unbind(2)  # [n, sides * ratio, D] each
        weights = score.masked_fill(at[..., None] < 0, float("-inf")).softmax(1)
        kv = kv.masked_fill(at[..., None] < 0, 0.0)  # what stands there may be NaN
        yield Finished(there, slots[part]), (weights * kv).sum(1)
