"""The cache layer that :mod:`mla_kernels.compat.transformers` puts into a transformers ``Cache``."""

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache


class PagedLayer(CacheLayerMixin):
    """What layers over paged caches have in common. A subclass has ``_rearrange(pick)``: its sequences become those
    that ``pick`` makes of a tensor [batch, ...]."""

    is_sliding = False
    is_compileable = False

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError(
            f"{type(self).__name__}.update: the model that uses this cache is not enabled; call "
            "mla_kernels.compat.transformers.enable(model) first"
        )

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rearrange(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rearrange(lambda t: t[indices])

    def offload(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: the cache cannot be offloaded; use cache_implementation='dynamic'"
        )

    prefetch = offload


class LatentLayer(PagedLayer):
    """One layer's latents in a paged :class:`LatentCache`, as a layer of a transformers ``Cache``.

    Sequence ``b`` owns pages ``b * pages_per_seq`` to ``(b + 1) * pages_per_seq - 1``. Padding is counted in
    ``get_seq_length``, as transformers expects, but takes no slot: with the mask ``[[0, 0, 1, 1], [1, 1, 1, 1]]`` and 4
    tokens a page, tokens 2 and 3 of sequence 0 lie in slots 0 and 1, sequence 1 in slots 4 to 7, and ``seq_lens`` is
    ``[2, 4]``. An indexer's keys, where the model has one, lie in the same slots of an :class:`IndexerCache`; a layer
    that attends to another layer's latents may hold such keys alone.
    ``enable`` installs these layers by itself; ``Cache(layers=[LatentLayer(page_size=128), ...])`` chooses another
    page size.
    """

    is_croppable = True

    def __init__(self, page_size: int = 64):
        self.page_size = page_size
        self.reset()

    def reset(self) -> None:
        """Forget every token and release the pages."""
        self.cache: LatentCache | None = None
        self.index_data: torch.Tensor | None = None  # an indexer's keys, [num_pages, page_size, width]
        self.block_table = self.seq_lens = None  # int32 [batch, pages_per_seq], int32 [batch]
        self.length = 0  # tokens seen, padding included
        self.kept: torch.Tensor | None = None  # bool [batch, length], False where padding; None: no padding
        self.new_kept: torch.Tensor | None = None  # bool [batch, tokens], the same of the newest tokens
        self.new_tokens = 0  # how many they are, padding included
        self.splits = False  # whether padding stands, or may stand, between a sequence's tokens
        self.pools = None  # the keys of an indexer that chooses pools of tokens
        self.differentiable = False  # whether the forward that stores the newest tokens records gradients
        self.is_initialized = False
        self.awaits_update = False  # whether `expect` was called and `update` has not come yet
        self.before: int | None = None  # length before the forward that is under way
        self.lost = False  # whether states beside this layer hold tokens of a forward that raised

    def expect(self, kept: torch.Tensor | None, *, differentiable: bool = False, splits: bool = False) -> None:
        """Say which of the next ``update``'s tokens are real (bool [batch, tokens]); None: all of them."""
        self.awaits_update, self.new_kept, self.differentiable, self.splits = True, kept, differentiable, splits
        self.before = self.length

    def undo(self) -> None:
        """Forget what a forward has stored that raised."""
        before, self.awaits_update, self.before = self.before, False, None
        if before == 0:
            self.reset()
        elif before is not None and self.length > before:
            self.crop(before - self.length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, latent_dim = key_states.shape
        if heads != 1 or value_states.shape[1] != 1:
            raise ValueError(
                f"LatentLayer: got {heads} key heads and {value_states.shape[1]} value heads, one latent and one "
                "rotated key a token are accepted"
            )
        self.device = key_states.device
        self.dtype = torch.promote_types(key_states.dtype, value_states.dtype)  # autocast gives each its own
        width = latent_dim + value_states.shape[-1]
        self.cache = LatentCache(key_states.new_zeros(0, self.page_size, width, dtype=self.dtype), latent_dim)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.block_table = torch.zeros(batch, 0, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the latents ``[batch, 1, tokens, latent]`` and rotated keys ``[batch, 1, tokens, rope]``.

        Returns them as they came, with this layer attached to the first as ``latent_layer`` for the attention function.
        """
        if not self.awaits_update:
            super().update(key_states, value_states)
        self.awaits_update = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        if batch != self.seq_lens.shape[0]:
            raise ValueError(f"LatentLayer.update: got a batch of {batch}, the cache holds {self.seq_lens.shape[0]}")
        self._reserve(self.length + tokens)
        self._count(batch, tokens)
        self._store(self._rows(), torch.cat((key_states.detach()[:, 0], value_states.detach()[:, 0]), -1))
        key_states.latent_layer = self
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Store the indexer's keys ``[batch, tokens, head_dim]`` of the tokens that ``update`` stored last.

        Returns the keys of every token so far, as transformers keeps them: ``[batch, length, head_dim]``.
        """
        self.store_indexer(indexer_key_states)
        return indexer_key_states if indexer_key_states.shape[1] == self.length else self.indexer_keys

    def store_indexer(self, indexer_key_states: torch.Tensor) -> None:
        """The same without a result."""
        new = indexer_key_states.detach()
        if self.awaits_update:  # this layer's latents are another's: here the narrowest that a LatentCache can hold
            self.update(
                new.new_zeros(new.shape[0], 1, new.shape[1], 16), new.new_zeros(new.shape[0], 1, new.shape[1], 0)
            )
        if self.index_data is None:
            self.index_data = new.new_zeros(self.cache.num_pages, self.page_size, new.shape[-1])
        self._store(self.index_rows(), new)

    def _count(self, batch: int, tokens: int) -> None:
        """Take the newest tokens into ``length``, ``kept`` and ``seq_lens``."""
        if self.kept is not None or self.new_kept is not None:
            old, new = self.kept, self.new_kept
            if old is None:
                old = torch.ones(batch, self.length, dtype=torch.bool, device=self.device)
            if new is None:
                new = torch.ones(batch, tokens, dtype=torch.bool, device=self.device)
            self.kept = torch.cat((old, new), -1)
        self.new_tokens = tokens
        self.seq_lens += self.new_lens()
        self.length += tokens

    def new_lens(self) -> torch.Tensor:
        """How many of the newest tokens of each sequence are real, int32 [batch]."""
        if self.new_kept is None:
            return torch.full_like(self.seq_lens, self.new_tokens)
        return self.new_kept.sum(-1, dtype=torch.int32)

    def new_positions(self) -> torch.Tensor:
        """Where the newest tokens stand among the real ones, int32 [batch, tokens]; -1 for padding."""
        before = (self.seq_lens - self.new_lens())[:, None]
        if self.new_kept is None:
            return before + torch.arange(self.new_tokens, dtype=torch.int32, device=self.device)
        return torch.where(self.new_kept, before + self.new_kept.cumsum(-1, dtype=torch.int32) - 1, -1)

    def _store(self, rows: torch.Tensor, new: torch.Tensor) -> None:
        """Put the newest tokens, ``[batch, tokens, width]`` and counted already, into ``[batch, slots, width]``.

        Padding goes to its sequence's first free slot, which the next real token takes.
        """
        batch, tokens, _ = new.shape
        if self.kept is None:
            rows[:, self.length - tokens : self.length] = new
            return
        sequence = torch.arange(batch, device=self.device)[:, None].expand(batch, tokens)
        kept = self.kept[:, self.length - tokens :]
        offsets = self.seq_lens[:, None] - kept.sum(-1, keepdim=True) + kept.cumsum(-1) - 1  # [batch, tokens]
        rows[sequence, torch.where(kept, offsets, self.seq_lens[:, None])] = new

    def _rows(self) -> torch.Tensor:
        """The pages of each sequence end to end: [batch, slots of a sequence, width]."""
        return self.cache.data.view(self.seq_lens.shape[0], -1, self.cache.data.shape[-1])

    @property
    def index_cache(self) -> IndexerCache | None:
        """The indexer's keys, for the ops that score them."""
        return None if self.index_data is None else IndexerCache(self.index_data, self.index_data.shape[-1])

    def index_rows(self) -> torch.Tensor:
        """The same of what an indexer keeps."""
        return self.index_data.view(self.seq_lens.shape[0], -1, self.index_data.shape[-1])

    def _set_rows(self, rows: torch.Tensor, index_rows: torch.Tensor | None) -> None:
        data = rows.reshape(-1, self.page_size, rows.shape[-1])
        self.cache = LatentCache(data, self.cache.latent_dim)
        self.block_table = torch.arange(data.shape[0], dtype=torch.int32, device=self.device).view(rows.shape[0], -1)
        if index_rows is not None:
            self.index_data = index_rows.reshape(-1, self.page_size, index_rows.shape[-1])

    def _reserve(self, slots: int) -> None:
        """Room for ``slots`` tokens a sequence; grows by half, so that decoding copies each token a few times only."""
        rows = self._rows() if self.cache.num_pages else self.cache.data.new_empty(self.seq_lens.shape[0], 0, 0)
        if slots <= rows.shape[1]:
            return
        pages = -(-max(slots, rows.shape[1] * 3 // 2) // self.page_size)
        grown = self.cache.data.new_zeros(rows.shape[0], pages * self.page_size, self.cache.data.shape[-1])
        if rows.shape[1]:
            grown[:, : rows.shape[1]] = rows
        index_grown = None
        if self.index_data is not None:
            index_rows = self.index_rows()
            index_grown = index_rows.new_zeros(*grown.shape[:2], index_rows.shape[-1])
            index_grown[:, : index_rows.shape[1]] = index_rows
        self._set_rows(grown, index_grown)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All sequences' tokens end to end, [tokens, width], and where each sequence starts, int32 [batch + 1]."""
        rows = self._rows()
        if self.kept is None:
            return rows[:, : self.length].flatten(0, 1), even_starts(rows.shape[0], self.length, self.device)
        real = torch.arange(rows.shape[1], device=self.device) < self.seq_lens[:, None]
        return rows[real], starts(self.seq_lens)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Every token where transformers keeps it, zeros for padding: [batch, length, width]."""
        if self.kept is None:
            return rows[:, : self.length]
        place = (self.kept.cumsum(-1) - 1).clamp(min=0)  # [batch, length]
        tokens = rows.gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))
        return tokens.masked_fill(~self.kept[..., None], 0)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """The slots of the tokens at these positions [batch, tokens, n], where padding counts; int32, -1 for positions
        below 0 and for padding."""
        places, chosen = positions.clamp(min=0).long(), positions >= 0
        if self.kept is not None:
            sequence = torch.arange(len(self.seq_lens), device=self.device)[:, None, None]
            chosen = chosen & self.kept[sequence, places]
            places = (self.kept.cumsum(-1) - 1)[sequence, places]
        return self.own_slots(places.masked_fill(~chosen, -1))

    def own_slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """The slots of these tokens of each sequence [batch, tokens, n], int32; padding does not count, -1 stays."""
        firsts = torch.arange(len(self.seq_lens), device=self.device) * self._rows().shape[1]
        return (tokens + firsts[:, None, None]).int().masked_fill(tokens < 0, -1)

    def window_slots(self, tokens: int, window: int) -> torch.Tensor:
        """The slots that each of the newest tokens sees through a window, [batch, tokens, window]; as in transformers
        padding takes room in it."""
        places = torch.arange(self.length - tokens, self.length, device=self.device)[:, None]
        places = places - torch.arange(window - 1, -1, -1, device=self.device)
        return self.slots(places.expand(len(self.seq_lens), -1, -1))

    @property
    def keys(self) -> torch.Tensor | None:
        """The latents in transformers' layout, [batch, 1, length, latent]."""
        return self._gather(self._rows())[:, None, :, : self.cache.latent_dim] if self.length else None

    @property
    def values(self) -> torch.Tensor | None:
        """The rotated keys in transformers' layout, [batch, 1, length, rope]."""
        return self._gather(self._rows())[:, None, :, self.cache.latent_dim :] if self.length else None

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """The indexer's keys in transformers' layout, [batch, length, head_dim]."""
        return None if self.index_data is None else self._gather(self.index_rows())

    @property
    def bytes_per_token(self) -> int:
        return self.cache.bytes_per_token

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep (older versions)."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        remove = min(remove, self.length)
        if remove == 0:
            return
        if self.kept is None:
            self.seq_lens -= remove
        else:
            self.seq_lens -= self.kept[:, -remove:].sum(-1, dtype=torch.int32)
            self.kept = self.kept[:, :-remove]
        self.length -= remove
        if self.pools is not None:
            self.pools.until = min(self.pools.until, self.length)

    def _rearrange(self, pick) -> None:
        if self.length:
            self._set_rows(pick(self._rows()), None if self.index_data is None else pick(self.index_rows()))
            self.seq_lens = pick(self.seq_lens)
            self.kept = None if self.kept is None else pick(self.kept)
            if self.pools is not None:
                self.pools.rearrange(pick)


def starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where sequences of these lengths start when they lie end to end: [2, 3] gives int32 [0, 2, 5]."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def even_starts(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The same for ``batch`` sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
