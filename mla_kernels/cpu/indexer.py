"""The lightning indexer for CPU tensors: keys into their cache, scores in blocks, the exact choice of the best keys."""

import torch

_MAX_LANES = 1 << 22  # values of a row block held at once, 16 MiB of fp32


def indexer_topk(
    logits: torch.Tensor, top_k: int, starts: torch.Tensor | None, ends: torch.Tensor | None
) -> torch.Tensor:
    """Rows in blocks; what lies outside a row's range counts as -inf."""
    rows, columns = logits.shape
    out = torch.full((rows, top_k), -1, dtype=torch.int32)
    wanted = min(top_k, columns)
    if rows == 0 or wanted == 0:
        return out
    step = max(1, _MAX_LANES // columns)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        values = logits[block].nan_to_num(float("-inf"), float("inf"), float("-inf"))
        _hide(values, None if starts is None else starts[block], None if ends is None else ends[block], 0)
        out[block, :wanted] = _best(values, wanted)
    return out


def _hide(values: torch.Tensor, starts: torch.Tensor | None, ends: torch.Tensor | None, first: int) -> None:
    """Make everything outside [starts, ends) of values [rows, columns first..] -inf, in place."""
    column = torch.arange(first, first + values.shape[1])
    if starts is not None and int(starts.max()) > first:
        values.masked_fill_(column < starts.unsqueeze(1), float("-inf"))
    if ends is not None and int(ends.min()) < first + values.shape[1]:
        values.masked_fill_(column >= ends.unsqueeze(1), float("-inf"))


def _best(values: torch.Tensor, wanted: int) -> torch.Tensor:
    """Indices of the largest values of each row, lowest index first among equals, ascending; -1 for -inf."""
    columns = values.shape[1]
    best, index = values.topk(wanted, sorted=False)
    least = best.amin(1, keepdim=True)
    index = index.masked_fill_(best == float("-inf"), columns).sort(1).values
    # torch chooses any of several equal values: rows that leave one of the least out are done again
    tied = ((values >= least).sum(1) > wanted) & (least.squeeze(1) > float("-inf"))
    if tied.any():
        values, least = values[tied], least[tied]
        above, equal = values > least, values == least
        missing = wanted - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
        index[tied] = chosen.nonzero()[:, 1].view(-1, wanted)
    return index.masked_fill_(index == columns, -1).to(torch.int32)
