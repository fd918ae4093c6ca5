"""The attention function that :mod:`mla_kernels.compat.transformers` registers with transformers."""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.prefill.op import check_widths, mla_prefill
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.compat.transformers_cache import even_starts, starts
from mla_kernels.compat.transformers_weights import absorbed_weight
from mla_kernels.nn import from_latent, to_latent

NAME = "mla_kernels"
"""Name of the attention and experts implementations in transformers' registries."""
MASK_OF_CHOICE = "build_attention_mask_from_topk"
"""The method of GLM-5-next's attention that turns its indexer's choice into a mask."""
DECODE_TOKENS = 16
"""Up to so many new tokens a sequence go through ``mla_decode``; more are a prefill.

Absorbed attention costs about 3.4 times the multiplications of expanded K and V for each pair of query and key, and
saves their expansion, which is shared by the queries of one call.
"""


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, indices=None, **kwargs):
    """transformers' attention function.

    query [batch, heads, tokens, nope + rope]; key and value are what ``LatentLayer.update`` returned; ``indices`` int32
    [batch, tokens, top_k] is the choice of an indexer, where the model has one; ``s_aux`` [heads] among the keywords
    are sinks, ``sliding_window`` a window. Returns [batch, tokens, heads, v].
    """
    options = dict(scaling=scaling, dropout=dropout, **kwargs)
    if "expand_kv" not in vars(module):  # not an enabled module: K and V arrive expanded
        return _sdpa(module, query, key, value, attention_mask, indices, options)
    layer = getattr(key, "latent_layer", None)
    if torch.is_autocast_enabled(query.device.type):
        return _without_autocast(module, query, key, value, layer, attention_mask, indices, options)
    positions = attention_mask if MASK_OF_CHOICE in vars(module) else None
    if layer is None and is_marked(attention_mask):
        raise RuntimeError(
            f"{type(module).__name__} of layer {module.layer_idx}: the cache that was prepared for it did not arrive, "
            "so that nothing says which tokens it may attend to; call mla_kernels.compat.transformers.disable(model)"
        )
    softmax = {"scaling": float(scaling), "sink": _sink(kwargs.get("s_aux"))}
    if layer is None or layer.differentiable:
        plain = attention_mask is None and indices is None and key.shape[2] == query.shape[2]
        if plain and dropout == 0 and has_prefill(module):
            tokens = even_starts(query.shape[0], query.shape[2], query.device)
            q, latents, rotated = query.transpose(1, 2).flatten(0, 1), key.flatten(0, 2), value.flatten(0, 2)
            out = _prefill(module, q, latents, rotated, tokens, tokens, query.shape[2], query.shape[2], softmax)
            return out.unflatten(0, (query.shape[0], query.shape[2])), None
        keys, values = type(module).expand_kv(module, key, value)
        if positions is not None:
            attention_mask = _mask_of(positions, keys.shape[2])
        return _sdpa(module, query, keys, values, attention_mask, indices, options)
    if dropout > 0:
        raise NotImplementedError(
            f"attention dropout: got {dropout} with a cache and without gradients; call model.eval(), or pass "
            "use_cache=False"
        )
    window = kwargs.get("sliding_window")
    if window is not None and expands_windows(module.kv_lora_rank, query.device):
        return _sdpa_of_window(module, query, layer, window, attention_mask, options)
    few = query.shape[2] <= DECODE_TOKENS and (layer.new_kept is None or query.shape[2] == 1)
    if positions is not None:
        indices = positions  # slots, where there is a layer
    elif window is not None and layer.length > window and (layer.kept is not None or not few):
        indices = layer.window_slots(query.shape[2], window)
    if indices is not None and indices.shape[-1]:
        return (_sparse_decode if few else _sparse_prefill)(module, query, layer, indices, softmax), None
    if few:
        return _decode(module, query, layer, window, softmax), None
    if has_prefill(module) and (layer.new_kept is None or not torch.compiler.is_compiling()):
        return _cached_prefill(module, query, key, value, layer, softmax), None
    if layer.length > query.shape[2]:
        key, value = layer.keys, layer.values
    keys, values = type(module).expand_kv(module, key, value)
    if positions is not None:
        attention_mask = _causal_mask(layer)
    return _sdpa(module, query, keys, values, attention_mask, None, options)


def _without_autocast(module, query, key, value, layer, attention_mask, indices, options):
    """Attention in the dtype of the weights: autocast leaves queries, latents and rotated keys in dtypes of their own,
    and acts on none of the ops. What follows is autocast as before."""
    dtype = next(p.dtype for p in module.kv_b_proj.parameters() if p.is_floating_point())
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if layer is not None:
        key.latent_layer = layer
    with torch.autocast(query.device.type, enabled=False):
        return attention(module, query, key, value, attention_mask, indices=indices, **options)


def mark(mask: torch.Tensor) -> torch.Tensor:
    """Mark a mask that says which keys are real, and leaves to the layers of the cache what is causal."""
    mask.of_latent_layers = True
    return mask


def is_marked(mask) -> bool:
    """Whether this is such a mask: attention without a layer of the cache must not take it for a whole one."""
    return getattr(mask, "of_latent_layers", False)


# ---------------------------------------------------------------------------------------------------------------------
# Expanded K and V


def _sdpa(module, query, keys, values, attention_mask, indices, options):
    """transformers' own attention, over the keys in ``indices`` only where an indexer chose."""
    if indices is not None and indices.shape[-1] < keys.shape[2]:
        attention_mask = _mask_of(indices, keys.shape[2]) & attention_mask  # [batch, 1, tokens, keys]
    if options.get("s_aux") is not None:
        return _with_sink(module, query, keys, values, attention_mask, options), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, attention_mask, **options)


def expands_windows(latent: int, device: torch.device) -> bool:
    """Whether layers with a window attend to expanded keys in every step: few chips have tiles for such a latent, as
    dots3-note's windows have it (1024 columns)."""
    return latent > 512 and device.type != "cpu"


def _sdpa_of_window(module, query, layer, window: int, attention_mask, options):
    """transformers' own attention over the newest keys, as many as the queries see."""
    newest = min(layer.length, window + query.shape[2] - 1)
    keys, values = type(module).expand_kv(module, layer.keys[:, :, -newest:], layer.values[:, :, -newest:])
    mask = None if attention_mask is None else attention_mask[..., -newest:]
    return _sdpa(module, query, keys, values, mask, None, options)


def _mask_of(indices, length: int) -> torch.Tensor:
    """Which of ``length`` keys the indices [batch, tokens, top_k] choose, bool [batch, 1, tokens, length]; -1: none."""
    shape = (*indices.shape[:2], length + 1)  # the last column takes what chooses nothing
    mask = torch.zeros(shape, dtype=torch.bool, device=indices.device)
    places = indices.long().masked_fill(indices < 0, length)
    return mask.scatter(-1, places, True)[:, None, :, :length]


def _causal_mask(layer) -> torch.Tensor:
    """Which keys the newest tokens see where an indexer chose all, bool [batch, 1, tokens, keys]."""
    place = torch.arange(layer.length, device=layer.device)
    mask = place <= place[-layer.new_tokens :, None]
    return mask[None, None] if layer.kept is None else mask & layer.kept[:, None, None]


def _with_sink(module, query, keys, values, attention_mask, options) -> torch.Tensor:
    """sdpa has no sinks: one more score a head, which weighs nothing. Returns [batch, tokens, heads, v]."""
    scores = (query @ keys.transpose(2, 3) * options["scaling"]).float()  # [batch, heads, tokens, keys]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    sink = _sink(options["s_aux"])[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    weights = F.dropout(weights, options["dropout"], module.training).to(values.dtype)
    return (weights @ values).transpose(1, 2)


def _sink(sink) -> torch.Tensor | None:
    """[heads] float32, of this rank's heads."""
    if sink is None:
        return None
    return (sink.to_local() if hasattr(sink, "to_local") else sink).float()


def has_prefill(module) -> bool:
    """Whether ``mla_prefill`` has tiles for the widths of the heads of this module."""
    try:
        check_widths(module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim)
    except NotImplementedError:
        return False
    return True


def _prefill(module, q, latents, rotated, starts_q, starts_k, longest_q: int, longest_k: int, softmax):
    """q [Tq, heads, nope + rope] over latents [Tk, latent] and rotated keys [Tk, rope]: [Tq, heads, v]."""
    nope = module.qk_nope_head_dim
    expanded = module.kv_b_proj(latents).unflatten(-1, (q.shape[1], -1))  # [Tk, heads, nope + v]
    out, lse = mla_prefill(
        q, expanded[..., :nope], expanded[..., nope:], starts_q, starts_k, max_seqlen_q=longest_q,
        max_seqlen_k=longest_k, softmax_scale=softmax["scaling"], k_rope=rotated if rotated.shape[-1] else None,
    )  # fmt: skip
    if softmax["sink"] is None:
        return out
    return out * torch.sigmoid(lse - softmax["sink"])[..., None].to(out.dtype)  # the sink in the softmax's denominator


def _cached_prefill(module, query, key, value, layer, softmax) -> torch.Tensor:
    """A prefill, or a chunk of one over what is cached: sequences end to end, padding left out."""
    kept = layer.new_kept
    q = _pack(query.transpose(1, 2), kept)
    starts_q = even_starts(query.shape[0], query.shape[2], query.device) if kept is None else starts(kept.sum(-1))
    if layer.length > query.shape[2]:
        rows, starts_k = layer.packed()
        latents, rotated = rows.split((layer.cache.latent_dim, layer.cache.rope_dim), -1)
    else:
        latents, rotated = (_pack(part[:, 0], kept) for part in (key, value))
        starts_k = starts_q
    out = _prefill(module, q, latents, rotated, starts_q, starts_k, query.shape[2], layer.length, softmax)
    return _unpack(out, query, kept)


def _pack(tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """[batch, tokens, ...] -> the kept tokens of all sequences end to end."""
    return tokens.flatten(0, 1) if kept is None else tokens[kept]


def _unpack(out, query, kept: torch.Tensor | None) -> torch.Tensor:
    """[Tq, heads, v] -> [batch, tokens, heads, v], zeros for what was not kept."""
    batch, _, tokens, _ = query.shape
    if kept is None:
        return out.unflatten(0, (batch, tokens))
    padded = out.new_zeros(batch, tokens, *out.shape[1:])
    padded[kept] = out
    return padded


# ---------------------------------------------------------------------------------------------------------------------
# In the latent space


def _absorb(module, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [..., heads, nope + rope] -> absorbed [..., heads, latent + rope]; and kv_b [heads, nope + v, latent]."""
    kv_b = absorbed_weight(module, q.shape[-2]).view(q.shape[-2], -1, module.kv_lora_rank)
    q_nope, q_rope = q.split((module.qk_nope_head_dim, module.qk_rope_head_dim), -1)
    return torch.cat((to_latent(q_nope, kv_b), q_rope), -1), kv_b


def _decode(module, query, layer, window, softmax) -> torch.Tensor:
    q, kv_b = _absorb(module, query.transpose(1, 2))
    out, _ = mla_decode(
        q, layer.cache, layer.block_table, layer.seq_lens, softmax_scale=softmax["scaling"], causal=True,
        window=window, sink=softmax["sink"],
    )  # fmt: skip
    return from_latent(out, kv_b, module.qk_nope_head_dim)


def _sparse_decode(module, query, layer, slots, softmax) -> torch.Tensor:
    q, kv_b = _absorb(module, query.transpose(1, 2))
    out, _ = sparse_mla_decode(q, layer.cache, slots, softmax_scale=softmax["scaling"], sink=softmax["sink"])
    return from_latent(out, kv_b, module.qk_nope_head_dim)


def _sparse_prefill(module, query, layer, slots, softmax) -> torch.Tensor:
    kept = None if torch.compiler.is_compiling() else layer.new_kept  # how many are kept is data
    q, kv_b = _absorb(module, _pack(query.transpose(1, 2), kept))
    rows = layer.cache.data.flatten(0, 1)  # a slot is a row
    out, _ = sparse_mla_prefill(
        q, rows, _pack(slots, kept), softmax_scale=softmax["scaling"], latent_dim=layer.cache.latent_dim,
        sink=softmax["sink"],
    )  # fmt: skip
    return _unpack(from_latent(out[None], kv_b, module.qk_nope_head_dim)[0], query, kept)


def keep_latents(latents, rotated):
    """Stands in for ``expand_kv`` of an enabled module, so that the attention function receives the latents."""
    return latents, rotated


def keep_choice(topk_indices, query_states, kv_length):
    """Stands in for ``build_attention_mask_from_topk``, so that the attention function receives what the indexer chose,
    int32 [batch, tokens, n] with -1 for none, in place of a mask: slots of the cache, or positions without one."""
    return topk_indices
