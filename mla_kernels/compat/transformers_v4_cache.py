"""The cache layers that :mod:`mla_kernels.compat.transformers` gives to DeepSeek-V4, and what they share."""

import torch

from mla_kernels.compat.transformers_cache import PagedLayer
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.nn.v4_cache import V4Cache, V4Sequences
from mla_kernels.nn.v4_config import V4AttentionConfig

PAGE = 64
LEAST_ROOM = 256
"""Tokens of a sequence that tables have room for at least; the room grows by half, in multiples of this."""
STEP = 32
"""New tokens of a sequence that go through the caches at a time."""


class V4Book:
    """What all layers of a cache have in common: the sequences' lengths, what of them is padding, and their pages.

    Padding counts in ``length``, as transformers expects, and is in no layer: with the mask ``[[0, 1, 1], [1, 1, 1]]``
    ``seq_lens`` is ``[2, 3]``. Sequence b has the ``ring`` pages ``b * ring`` to ``(b + 1) * ring - 1`` for its raw
    tokens, in turns, since a window is all that is read of them, and consecutive pages for entries.

    ``layout`` is that of raw tokens and entries (None: the model's dtype), ``index_layout`` that of index keys.
    """

    def __init__(self, window: int, layout: str | None = None, index_layout: str = "bf16"):
        self.ring = -(-(window + STEP) // PAGE) + 1
        self.layout, self.index_layout = layout, index_layout
        self.reset()

    def reset(self) -> None:
        self.seq_lens: torch.Tensor | None = None  # int32 [batch]
        self.kept: torch.Tensor | None = None  # bool [batch, length], False where padding; None: no padding
        self.length = 0
        self.room = LEAST_ROOM
        self.before: tuple | None = None  # lengths and padding before the forward that is under way

    def count(self, batch: int, tokens: int, kept: torch.Tensor | None, device) -> None:
        """Take new tokens in, until :meth:`finish` or :meth:`undo`; ``kept`` says which are no padding."""
        if self.seq_lens is not None and self.seq_lens.shape[0] != batch:
            raise ValueError(f"cache: got a batch of {batch}, the cache holds {self.seq_lens.shape[0]}")
        self.before = self.seq_lens, self.kept, self.length
        if self.seq_lens is None:
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        if self.kept is not None or kept is not None:
            new = torch.ones(batch, tokens, dtype=torch.bool, device=device) if kept is None else kept
            old = self.kept
            if old is None:
                old = torch.ones(batch, self.length, dtype=torch.bool, device=device)
            self.kept = torch.cat((old, new), -1)
        self.seq_lens = self.seq_lens + (tokens if kept is None else kept.sum(-1, dtype=torch.int32))
        self.length += tokens
        if self.length > self.room:
            self.room = -(-max(self.length, self.room * 3 // 2) // LEAST_ROOM) * LEAST_ROOM

    def finish(self) -> None:
        """The forward with the newest tokens is done."""
        self.before = None

    def undo(self) -> None:
        """The forward with the newest tokens raised: they are forgotten. The room stays."""
        if self.before is not None:
            self.seq_lens, self.kept, self.length = self.before
            self.before = None

    def pages(self, ratio: int) -> int:
        """Pages of entries a sequence."""
        return -(-(self.room // ratio) // PAGE)

    def sequences(self, ratios, seq_lens: torch.Tensor, rows: slice) -> V4Sequences:
        """Tables of these lengths, of some sequences."""
        batch, device = self.seq_lens.shape[0], self.seq_lens.device
        sequence = torch.arange(batch, dtype=torch.int32, device=device)[rows, None]
        page = torch.arange(self.room // PAGE, dtype=torch.int32, device=device)
        window = sequence * self.ring + page % self.ring
        tables = {}
        for ratio in ratios:
            pages = self.pages(ratio)
            tables[ratio] = sequence * pages + torch.arange(pages, dtype=torch.int32, device=device)
        return V4Sequences(seq_lens, window, tables, sequence.flatten().contiguous(), max_seqlen=self.room)

    def slots(self, sequences: V4Sequences, positions: torch.Tensor) -> torch.Tensor:
        """Slots of the raw tokens at positions [batch, tokens]."""
        page = sequences.window_table.gather(1, (positions // PAGE).long())
        return page * PAGE + positions % PAGE

    def rearrange(self, pick) -> None:
        if self.seq_lens is not None:
            self.seq_lens = pick(self.seq_lens)
            self.kept = None if self.kept is None else pick(self.kept)


class V4Layer(PagedLayer):
    """One layer's raw tokens, entries, index keys and compressor states, as a layer of a transformers ``Cache``.

    ``enable`` installs these layers by itself. They cannot be cropped: transformers takes V4 for stateful.
    """

    is_croppable = False

    def __init__(self, config: V4AttentionConfig, book: V4Book, first: bool):
        self.config, self.book, self.first = config, book, first
        self.caches: V4Cache | None = None
        self.saved: list | None = None  # rings and what they held before the forward that is under way
        self.is_initialized = False

    def reset(self) -> None:
        """Forget every token and release the memory."""
        self.caches, self.saved, self.is_initialized = None, None, False
        if self.first:
            self.book.reset()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        batch, config = self.book.seq_lens.shape[0], self.config
        self.model_dtype, self.device = key_states.dtype, key_states.device
        self.dtype = self._projected()
        self.caches = V4Cache.allocate(
            config, num_pages=batch * self.book.ring, page_size=PAGE, entry_pages=0, slots=batch, new_tokens=STEP,
            dtype=self.dtype, layout=self.book.layout, index_layout=self.book.index_layout, device=self.device,
        )  # fmt: skip
        self.is_initialized = True

    def save(self) -> None:
        """Keep what the rings hold: more tokens than a step go through them than they have room for behind a window."""
        caches = self.caches
        rings = [ring for ring in (caches.window.data, caches.state, caches.index_state) if ring is not None]
        self.saved = [(ring, ring.clone()) for ring in rings]

    def finish(self) -> None:
        """The forward that is under way is done."""
        self.saved = None

    def undo(self) -> None:
        """The forward that is under way raised. The book has forgotten its tokens already."""
        if self.book.seq_lens is None:
            self.caches, self.is_initialized = None, False
        for ring, held in self.saved or ():
            ring.copy_(held)
        self.saved = None

    def reserve(self, hidden: torch.Tensor) -> V4Cache:
        """The caches, with room for the entries that the book counts."""
        if self.caches is None:
            self.lazy_initialization(hidden)
        if self.config.ratio:
            pages = self.book.pages(self.config.ratio)
            if self.caches.entries.num_pages != pages * self.book.seq_lens.shape[0]:
                self._map_pages(lambda data: _grown(data, pages))
        return self.caches

    def _projected(self) -> torch.dtype:
        """The dtype of what this model's projections give: under ``torch.autocast`` that of autocast."""
        kind = self.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return self.model_dtype
        return torch.get_autocast_dtype(kind)

    def check_dtype(self, name: str) -> None:
        """Refuse to go on in another dtype than the tokens that are here."""
        if self.is_initialized and self.dtype != self._projected():
            raise TypeError(
                f"{name}: got tokens of {self._projected()}, the cache was filled with {self.dtype}; call the model "
                "under the same autocast"
            )

    def _map_pages(self, function) -> None:
        """Entries and index keys, [batch, pages of a sequence, ...], become what ``function`` makes of them."""
        caches = self.caches
        batch = caches.window.num_pages // self.book.ring

        def mapped(data):
            return function(data.unflatten(0, (batch, data.shape[0] // batch))).flatten(0, 1)

        entries = LatentCache(mapped(caches.entries.data), caches.entries.latent_dim, caches.entries.layout)
        keys = caches.index_keys
        keys = None if keys is None else IndexerCache(mapped(keys.data), keys.head_dim, keys.layout)
        self.caches = V4Cache(caches.window, entries, caches.state, keys, caches.index_state)

    @property
    def bytes(self) -> int:
        """Bytes of this layer."""
        caches = self.caches
        if caches is None:
            return 0
        parts = [caches.window.data, caches.state, caches.index_state]
        parts += [cache.data for cache in (caches.entries, caches.index_keys) if cache is not None]
        return sum(part.nbytes for part in parts if part is not None)

    def get_seq_length(self) -> int:
        return self.book.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.book.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("V4Layer: the compressors' states cannot be cropped")

    def _rearrange(self, pick) -> None:
        if self.caches is not None:
            ring, caches = self.book.ring, self.caches  # whose batch the book may have left behind already
            if self.config.ratio:
                self._map_pages(pick)
            data = pick(caches.window.data.unflatten(0, (-1, ring))).flatten(0, 1)
            window = LatentCache(data, self.config.head_dim, caches.window.layout)
            states = [None if state is None else pick(state) for state in (caches.state, caches.index_state)]
            self.caches = V4Cache(window, self.caches.entries, states[0], self.caches.index_keys, states[1])
        if self.first:
            self.book.rearrange(pick)


def _grown(data: torch.Tensor, pages: int) -> torch.Tensor:
    """data [batch, pages of a sequence, ...] with so many pages."""
    grown = data.new_zeros(data.shape[0], pages, *data.shape[2:])
    grown[:, : data.shape[1]] = data
    return grown
