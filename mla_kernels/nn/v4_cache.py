"""What one DeepSeek-V4 layer keeps of its sequences, and where the sequences of a batch stand in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mla_kernels.attention.sparse.slots import entry_slots, window_slots
from mla_kernels.checks import check_int, check_tensor
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.nn.v4_config import V4AttentionConfig


@dataclass(frozen=True, eq=False)
class V4Cache:
    """One layer's caches. All tokens of a sequence may share the pages of a ring, since only a window is read.

    Args:
        window: raw tokens, ``latent_dim`` the head's width, ``rope_dim`` 0.
        entries: compressed entries, as wide and in the same layout and dtype; None in a ``"sliding_attention"`` layer.
        state: [slots, rows, 2, W], the compressor's newest raw projections: see :func:`mla_kernels.write_windows`.
        index_keys: the indexer's entries, in the slots of ``entries``; with ``index_state``, its own compressor's
            state, in a ``"compressed_sparse_attention"`` layer alone.
    """

    window: LatentCache
    entries: LatentCache | None = None
    state: torch.Tensor | None = None
    index_keys: IndexerCache | None = None
    index_state: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls,
        config: V4AttentionConfig,
        *,
        num_pages: int,
        page_size: int = 64,
        entry_pages: int = 0,
        slots: int = 1,
        new_tokens: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        layout: str | None = None,
        index_layout: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> "V4Cache":
        """Empty caches for one layer.

        Args:
            num_pages, page_size: of raw tokens.
            entry_pages: pages of ``page_size`` entries, and of the indexer's keys.
            slots: sequences that have a state.
            new_tokens: the most new tokens of a decode step.
            dtype: of the model. layout: of raw tokens and entries; None: ``dtype``.
            index_layout: of the indexer's keys, ``"bf16"`` (that is ``dtype``) or ``"fp8"``.
        """
        check_int("slots", slots, 0)
        check_int("new_tokens", new_tokens, 1)
        places = {"latent_dim": config.head_dim, "rope_dim": 0, "dtype": dtype, "layout": layout, "device": device}
        window = LatentCache.allocate(num_pages, page_size, **places)
        if not config.ratio:
            return cls(window)
        rows = config.ratio * (1 + config.overlap) - 1 + new_tokens

        def state(width):
            width *= 1 + config.overlap
            return torch.zeros(slots, rows, 2, width, dtype=dtype, device=device)

        entries = LatentCache.allocate(entry_pages, page_size, **places)
        if not config.overlap:
            return cls(window, entries, state(config.head_dim))
        keys = IndexerCache.allocate(
            entry_pages, page_size, head_dim=config.index_head_dim, dtype=dtype, layout=index_layout, device=device
        )
        return cls(window, entries, state(config.head_dim), keys, state(config.index_head_dim))

    def bytes_per_token(self, config: V4AttentionConfig) -> float:
        """Bytes that each further token of a sequence takes: its share of an entry, and of an index key. Raw tokens and
        states take none: a sequence has a window of them, whatever its length."""
        parts = [part for part in (self.entries, self.index_keys) if part is not None]
        return sum(part.bytes_per_token for part in parts) / max(config.ratio, 1)

    def check(self, config: V4AttentionConfig) -> None:
        """Refuse a cache of another layer type, or of other widths."""
        wanted = {"entries": bool(config.ratio), "state": bool(config.ratio)}
        wanted |= dict.fromkeys(("index_keys", "index_state"), config.overlap)
        for name, needed in wanted.items():
            if (getattr(self, name) is not None) != needed:
                got, accepted = ("None", "a value") if needed else ("a value", "None")
                raise ValueError(f"cache.{name}: got {got}, {accepted} is accepted by a layer of {config.layer_type!r}")
        for name in ("window", "entries"):
            cache = getattr(self, name)
            if cache is not None and (cache.latent_dim, cache.rope_dim) != (config.head_dim, 0):
                raise ValueError(
                    f"cache.{name}: got latent_dim {cache.latent_dim} and rope_dim {cache.rope_dim}, "
                    f"{config.head_dim} and 0 are accepted"
                )
        if self.entries is not None:
            check_tensor("cache.entries.data", self.entries.data, rank=3, like=self.window.data)
            if self.entries.layout != self.window.layout:
                raise ValueError(
                    f"cache.entries: got layout {self.entries.layout.value}, that of window is accepted "
                    f"({self.window.layout.value})"
                )
        self._check_states(config)
        if self.index_keys is not None:
            self._check_index_keys(config)

    def _check_index_keys(self, config: V4AttentionConfig) -> None:
        keys, entries = self.index_keys, self.entries
        if keys.num_slots != entries.num_slots:
            raise ValueError(
                f"cache.index_keys: got {keys.num_slots} slots, {entries.num_slots} are accepted, those of entries"
            )
        if keys.page_size != entries.page_size:
            raise ValueError(f"cache.index_keys: got pages of {keys.page_size}, {entries.page_size} are accepted")
        if keys.head_dim != config.index_head_dim:
            raise ValueError(f"cache.index_keys: got head_dim {keys.head_dim}, {config.index_head_dim} is accepted")
        dtypes = (torch.uint8,) if keys.quantised else (self.window.dtype,)
        check_tensor("cache.index_keys.data", keys.data, dtypes=dtypes, device=self.window.data.device)

    def _check_states(self, config: V4AttentionConfig) -> None:
        """Refuse states that a compressor cannot use, or that two do not use alike."""
        sides = 1 + config.overlap
        if config.ratio:
            shape = (None, None, 2, sides * config.head_dim)
            places = {"dtypes": (self.window.dtype,), "device": self.window.data.device}
            check_tensor("cache.state", self.state, shape=shape, **places)
            if self.state.shape[1] < config.ratio * sides:
                raise ValueError(
                    f"cache.state: got {self.state.shape[1]} rows, at least {config.ratio * sides} are accepted"
                )
        if config.overlap:
            shape = (*self.state.shape[:3], sides * config.index_head_dim)
            check_tensor("cache.index_state", self.index_state, shape=shape, like=self.state)


@dataclass(eq=False)
class V4Sequences:
    """Where the sequences of a batch stand in the caches of all layers; what layers share is computed once.

    Args:
        seq_lens: [B] int32, tokens of each sequence with the new ones.
        window_table: [B, P] int32, the pages of its raw tokens: token j is in page ``window_table[b, j // page_size]``.
            Pages whose tokens no window reaches any more may come again, so that a sequence needs
            ``ceil((window + new tokens) / page_size) + 1`` of them.
        entry_tables: by ratio, [B, P] int32, the pages of its entries.
        state_slots: [B] int32, its slot in every layer's states; -1: none.
        max_seqlen: no sequence is longer; None: as the tables allow.
    """

    seq_lens: torch.Tensor
    window_table: torch.Tensor
    entry_tables: Mapping[int, torch.Tensor] = field(default_factory=dict)
    state_slots: torch.Tensor | None = None
    max_seqlen: int | None = None
    _made: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        check_tensor("seq_lens", self.seq_lens, rank=1, dtypes=(torch.int32,))
        batch, device = self.seq_lens.shape[0], self.seq_lens.device
        tables = {"window_table": self.window_table}
        tables |= {f"entry_tables[{ratio}]": table for ratio, table in self.entry_tables.items()}
        for name, table in tables.items():
            check_tensor(name, table, shape=(batch, None), dtypes=(torch.int32,), device=device)
        if self.state_slots is not None:
            check_tensor("state_slots", self.state_slots, shape=(batch,), dtypes=(torch.int32,), device=device)
        if self.max_seqlen is not None:
            check_int("max_seqlen", self.max_seqlen, 0)

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def check(self, config: V4AttentionConfig) -> None:
        """Refuse to serve a layer that needs a table or slots which are not here."""
        if config.ratio and config.ratio not in self.entry_tables:
            raise ValueError(
                f"entry_tables: got tables of ratios {sorted(self.entry_tables)}, a layer of {config.layer_type!r} "
                f"needs {config.ratio}"
            )
        if config.ratio and self.state_slots is None:
            raise ValueError(f"state_slots: got None, a layer of {config.layer_type!r} needs them")

    def positions(self, queries: int) -> torch.Tensor:
        """[B, queries] int32, the positions of the newest tokens."""

        def make():
            last = torch.arange(-queries, 0, dtype=torch.int32, device=self.seq_lens.device)
            return self.seq_lens[:, None] + last

        return self._once(("positions", queries), make)

    def bounds(self, queries: int) -> torch.Tensor:
        """cu_seqlens int32 [B + 1] of as many new tokens of each."""
        batch, device = self.seq_lens.shape[0], self.seq_lens.device
        return self._once(
            ("bounds", queries), lambda: torch.arange(batch + 1, dtype=torch.int32, device=device) * queries
        )

    def entry_lens(self, ratio: int) -> torch.Tensor:
        """[B] int32, complete entries of each."""
        return self._once(("entries", ratio), lambda: self.seq_lens // ratio)

    def limits(self, queries: int, ratio: int) -> torch.Tensor:
        """[B, queries] int32, how many entries each query sees."""
        return self._once(("limits", queries, ratio), lambda: (self.positions(queries) + 1) // ratio)

    def room(self, ratio: int, page_size: int) -> int:
        """The most entries of a sequence."""
        room = self.entry_tables[ratio].shape[1] * page_size
        return room if self.max_seqlen is None else min(room, self.max_seqlen // ratio)

    def window_slots(self, queries: int, window: int, page_size: int) -> torch.Tensor:
        """[B, queries, window]: see :func:`mla_kernels.window_slots`."""
        sizes = {"queries": queries, "window": window, "page_size": page_size}
        return self._once(("window", *sizes.values()), lambda: window_slots(self.window_table, self.seq_lens, **sizes))

    def entry_slots(self, queries: int, ratio: int, page_size: int) -> torch.Tensor:
        """[B, queries, :meth:`room`]: see :func:`mla_kernels.entry_slots`."""
        sizes = {"queries": queries, "ratio": ratio, "page_size": page_size}
        sizes["max_entries"] = self.room(ratio, page_size)
        table = self.entry_tables[ratio]
        return self._once(("slots", *sizes.values()), lambda: entry_slots(table, self.seq_lens, **sizes))
