"""The attention function that :mod:`mla_kernels.compat.transformers` registers with transformers."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_kernels.attention.decode import mla_decode
from mla_kernels.nn import absorb_query, expand_output

DECODE_TOKENS = 16
"""Up to so many new tokens a sequence go through ``mla_decode``; more are a prefill.

Absorbed attention costs about 3.4 times the multiplications of expanded K and V for each pair of query and key, and
saves their expansion, which is shared by the queries of one call.
"""


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, indices=None, **kwargs):
    """transformers' attention function: ``mla_decode`` for a few new tokens, sdpa on expanded K and V otherwise.

    query [batch, heads, tokens, nope + rope]; key and value are what ``LatentLayer.update`` returned; ``indices`` int32
    [batch, tokens, top_k] the keys that an indexer chose, where the model has one. Returns [batch, tokens, heads, v].
    """
    options = dict(scaling=scaling, dropout=dropout, **kwargs)
    if "expand_kv" not in vars(module):  # not an enabled module: K and V arrive expanded
        return _sdpa(module, query, key, value, attention_mask, indices, options)
    layer = getattr(key, "latent_layer", None)
    tokens = query.shape[2]
    wants_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    sparse = indices is not None and indices.shape[-1] < (layer.length if layer else key.shape[2])
    if layer is None or tokens > DECODE_TOKENS or layer._new_kept is not None or wants_gradient or sparse:
        if layer is not None and layer.length > tokens:
            if wants_gradient:
                raise NotImplementedError("the latent cache keeps no gradients: pass use_cache=False to train")
            key, value = layer.keys, layer.values
        keys, values = type(module).expand_kv(module, key, value)
        return _sdpa(module, query, keys, values, attention_mask, indices, options)
    return _decode(module, query, layer, float(scaling)), None


def _sdpa(module, query, keys, values, attention_mask, indices, options):
    """transformers' own attention, over the keys in ``indices`` only where an indexer chose."""
    if indices is not None and indices.shape[-1] < keys.shape[2]:
        batch, tokens = indices.shape[:2]
        chosen = torch.zeros(batch, tokens, keys.shape[2], dtype=torch.bool, device=keys.device)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]  # [batch, 1, tokens, keys]
        attention_mask = chosen & attention_mask
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, attention_mask, **options)


def _decode(module, query, layer, softmax_scale: float) -> torch.Tensor:
    """Attend to the whole latent cache without expanding it: [batch, tokens, heads, v]."""
    nope = module.qk_nope_head_dim
    kv_b = kv_b_weight(module).view(query.shape[1], -1, module.kv_lora_rank)  # [heads, nope + v, latent]
    q_nope, q_rope = query.split((nope, query.shape[-1] - nope), -1)
    q = torch.cat((absorb_query(q_nope.transpose(1, 2), kv_b), q_rope.transpose(1, 2)), -1)
    out, _ = mla_decode(q, layer.cache, layer.block_table, layer.seq_lens, softmax_scale=softmax_scale, causal=True)
    return expand_output(out, kv_b, nope)


def keep_latents(latents, rotated):
    """Stands in for ``expand_kv`` of an enabled module, so that the attention function receives the latents."""
    return latents, rotated


def kv_b_weight(module) -> torch.Tensor:
    if type(module.kv_b_proj) is not nn.Linear or module.kv_b_proj.bias is not None:
        kind = type(module.kv_b_proj).__name__
        raise TypeError(
            f"kv_b_proj of layer {module.layer_idx}: got {kind}{' with a bias' if kind == 'Linear' else ''}, "
            "torch.nn.Linear without bias is accepted (merge adapters and dequantise first: decoding absorbs its "
            "weight into the query)"
        )
    return module.kv_b_proj.weight
