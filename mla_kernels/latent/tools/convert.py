"""convert_cache: the same tokens in another layout."""

import torch

from mla_kernels.checks import check_no_grad
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.tools.gather import gather_tokens
from mla_kernels.latent.tools.scatter import scatter_tokens
from mla_kernels.latent.write import check_cache

TOKENS_AT_ONCE = 1 << 16


def convert_cache(cache: LatentCache, layout: CacheLayout | str, *, dtype: torch.dtype | None = None) -> LatentCache:
    """A new dense cache with the same tokens in the same slots, in another layout.

    Two launches for each 65,536 tokens, whose values are held in between (in float32 from one quantised layout to the
    other, else in the wider of the two dtypes): 151 MB for 512 + 64 in float32. To the same layout it copies.
    Every slot is converted, written or not; what was never written stays zero.

    Args:
        cache: the :class:`LatentCache` read.
        layout: a :class:`CacheLayout` or its value. ``fp8_v32`` takes a latent_dim that is a multiple of 128,
            ``fp8_v4`` one of at least 256 with rope_dim 0, the last 64 latents rotated.
        dtype: for ``latent_16bit`` float16 or bfloat16; None is the cache's own dtype where the layout has it, else
            bfloat16. The other layouts have one dtype each.

    Returns:
        The new cache, on the same device, ``[num_pages, page_size, ...]`` as the layout has it.

    Raises:
        TypeError: ``cache`` is no LatentCache, or ``dtype`` is not one of the layout's.
        ValueError: an unknown layout, or a latent_dim that it does not take.
        NotImplementedError: the cache requires grad (there is no backward).

    Source: the layouts and quantisers of :class:`CacheLayout`.
    """
    check_cache(cache)
    check_no_grad("convert_cache", cache=cache.data)
    layout = CacheLayout.named(layout)
    if dtype is None:
        has_dtype = not layout.quantised and cache.dtype in layout.dtypes
        dtype = cache.dtype if has_dtype else torch.float32 if layout is CacheLayout.LATENT_32BIT else torch.bfloat16
    sizes = {"latent_dim": cache.latent_dim, "rope_dim": cache.rope_dim, "dtype": dtype, "layout": layout}
    converted = LatentCache.allocate(cache.num_pages, cache.page_size, device=cache.data.device, **sizes)
    if cache.layout is layout or not (cache.layout.quantised or layout.quantised):
        converted.data.copy_(cache.data)
    else:
        values = dtype if not layout.quantised else torch.float32 if cache.layout.quantised else cache.dtype
        for start in range(0, cache.num_slots, TOKENS_AT_ONCE):
            slots = torch.arange(start, min(start + TOKENS_AT_ONCE, cache.num_slots), device=cache.data.device)
            tokens = gather_tokens(cache, slots, dtype=values)
            scatter_tokens(tokens[:, : cache.latent_dim], tokens[:, cache.latent_dim :], slots, converted)
    return converted
