"""Sizes of one DeepSeek-V4 attention layer."""

from dataclasses import dataclass

from mla_kernels.checks import check_choice, check_int

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYER_TYPES = (SLIDING, SPARSE, HEAVY)


@dataclass(frozen=True)
class V4AttentionConfig:
    """Sizes and constants of one attention layer; the defaults are DeepSeek-V4-Flash's.

    Args:
        layer_type: ``"sliding_attention"``: the window alone. ``"heavily_compressed_attention"`` (HCA): the window and
            one entry for each ``ratio`` tokens. ``"compressed_sparse_attention"`` (CSA): the window and those
            ``index_top_k`` of such entries, which overlap, that an indexer chooses.
        head_dim: width of a head and of the one key, which is the value, too; its last ``rope_dim`` values are rotated.
        window: raw tokens that a token sees, itself included.
        ratio: tokens of an entry; 0 for ``"sliding_attention"``.
    """

    layer_type: str = SPARSE
    hidden_size: int = 4096
    num_heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    window: int = 128
    ratio: int = 4
    index_heads: int = 64
    index_head_dim: int = 128
    index_top_k: int = 512
    eps: float = 1e-6

    def __post_init__(self):
        check_choice("layer_type", self.layer_type, LAYER_TYPES)
        check_int("window", self.window, 1)
        if self.layer_type == SLIDING:
            if self.ratio != 0:
                raise ValueError(f"ratio: got {self.ratio} with layer_type {SLIDING!r}, 0 is accepted")
        else:
            check_int("ratio", self.ratio, 1)
        widest = min(self.head_dim, self.index_head_dim) if self.overlap else self.head_dim
        check_int("rope_dim", self.rope_dim, 16, widest)
        if self.num_heads % self.o_groups:
            raise ValueError(f"o_groups: got {self.o_groups}, a divisor of num_heads ({self.num_heads}) is accepted")

    @property
    def overlap(self) -> bool:
        """Whether an entry takes in the window before its own, too."""
        return self.layer_type == SPARSE

    @property
    def rope(self) -> str:
        """Which of a model's two rotary embeddings the layer has: ``"main"`` or ``"compress"``."""
        return "main" if self.layer_type == SLIDING else "compress"

    @classmethod
    def from_hf(cls, config, layer: int) -> "V4AttentionConfig":
        """Of a layer of transformers' ``DeepseekV4Config``. Tables of its angles:
        ``rope_tables(self.rope_dim, positions, config.rope_parameters[self.rope])``.

        Raises:
            ValueError: another ``model_type``.
        """
        check_choice("config.model_type", config.model_type, ("deepseek_v4",))
        check_int("layer", layer, 0, config.num_hidden_layers - 1)
        kind = config.layer_types[layer]
        return cls(
            layer_type=kind,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            rope_dim=config.qk_rope_head_dim,
            q_lora_rank=config.q_lora_rank,
            o_groups=config.o_groups,
            o_lora_rank=config.o_lora_rank,
            window=config.sliding_window,
            ratio=0 if kind == SLIDING else config.compress_rates[kind],
            index_heads=config.index_n_heads,
            index_head_dim=config.index_head_dim,
            index_top_k=config.index_topk,
            eps=config.rms_norm_eps,
        )
