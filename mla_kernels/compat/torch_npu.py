"""torch_npu's MLA and MoE functions over this library's ops: same names, arguments, order, defaults and layouts.

Import from ``mla_kernels.compat.torch_npu`` what was called as ``torch_npu.npu_...``: on ``npu``, ``cuda`` and CPU
tensors alike. Signatures are those of torch_npu 2.14.0, and so are semantics, as far as its documentation and that of
CANN's operators state them. Where CANN fixes a geometry (heads, widths, block sizes) any that the ops take is accepted.
What is not accepted raises with the reason; nothing that is given is passed over.

What differs from this library's ops: a layer's cache is two tensors there, latents and rotated keys.
:func:`cache_views` gives both as views of a :class:`mla_kernels.LatentCache`, which is then read and written in place;
other pairs work, too, and are copied where they are read. Tables of rotation have a row a token and both halves. Keys
are named by their position in the sequence, not by slots.

``docs/drop-in.md`` says for each argument what is supported.
"""

from mla_kernels.compat.torch_npu_attention import npu_fused_infer_attention_score
from mla_kernels.compat.torch_npu_cache import (
    cache_views,
    npu_kv_rmsnorm_rope_cache,
    npu_kv_rmsnorm_rope_cache_v2,
    npu_mla_prolog_v3,
)
from mla_kernels.compat.torch_npu_exchange import npu_moe_distribute_combine, npu_moe_distribute_dispatch
from mla_kernels.compat.torch_npu_moe import (
    npu_grouped_matmul,
    npu_moe_finalize_routing,
    npu_moe_gating_top_k,
    npu_moe_init_routing_v2,
)
from mla_kernels.compat.torch_npu_sparse import npu_lightning_indexer, npu_sparse_flash_attention

__all__ = [
    "cache_views",
    "npu_fused_infer_attention_score",
    "npu_grouped_matmul",
    "npu_kv_rmsnorm_rope_cache",
    "npu_kv_rmsnorm_rope_cache_v2",
    "npu_lightning_indexer",
    "npu_mla_prolog_v3",
    "npu_moe_distribute_combine",
    "npu_moe_distribute_dispatch",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_init_routing_v2",
    "npu_sparse_flash_attention",
]
