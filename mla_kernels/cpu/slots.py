"""Slots of the tokens, or of the entries, that queries see, for CPU tensors."""

import torch


def window_slots(block_table, seq_lens, queries, window, page_size):
    return _newest(block_table, seq_lens, queries, 1, window, page_size)


def entry_slots(block_table, seq_lens, queries, ratio, page_size, max_entries):
    return _newest(block_table, seq_lens, queries, ratio, max_entries, page_size)


def _newest(block_table, seq_lens, queries, ratio, width, page_size):
    """[B, queries, width] int32: slots of the newest ``width`` things, one for ``ratio`` tokens, that a query sees."""
    pages = block_table.shape[1]
    seen = (seq_lens.long()[:, None] + (torch.arange(queries) + 1 - queries)).clamp_min_(0) // ratio  # [B, queries]
    places = (seen - width).clamp_min_(0).unsqueeze(2) + torch.arange(width)
    absent = (places >= seen.unsqueeze(2)) | (places >= pages * page_size)
    if pages == 0:
        return block_table.new_full(places.shape, -1)
    index = (places // page_size).clamp_max_(pages - 1)
    page = block_table.long().gather(1, index.flatten(1)).view_as(index)
    slots = page * page_size + places % page_size
    absent |= (page < 0) | (page >= ((1 << 31) - 1) // page_size)
    return slots.masked_fill_(absent, -1).int()
