"""DeepSeek-V2 and V3 models of Hugging Face transformers over this library's ops.

``enable(model)`` makes a loaded model keep its latents in paged :class:`LatentCache` buffers, decode in the latent
space with ``mla_decode``, and run its experts with ``fused_moe``; ``disable(model)`` gives it transformers' own code
back. Both use transformers' public hooks (``AttentionInterface``, ``AttentionMaskInterface``, ``ExpertsInterface``,
cache layers) and a torch forward pre-hook. One undocumented method is needed, ``expand_kv`` of the attention modules;
where it is missing, ``enable`` says so.

The attention and experts functions are registered as ``"mla_kernels"`` when this module is imported, so
``model.set_experts_implementation("mla_kernels")`` alone works on any model whose experts use plain SwiGLU.
"""

import contextlib
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.attention.decode import mla_decode
from mla_kernels.checks import FLOATS
from mla_kernels.latent.cache import LatentCache
from mla_kernels.moe.fused import fused_moe
from mla_kernels.nn import absorb_query, expand_output

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
    from transformers import __version__ as _TRANSFORMERS_VERSION
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as _v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as _v3

    from mla_kernels.compat.transformers_cache import LatentLayer
except ImportError as error:
    raise ImportError(
        "mla_kernels.compat.transformers needs transformers 5.15 or newer: pip install 'mla_kernels[transformers]'"
    ) from error

__all__ = ["NAME", "LatentLayer", "disable", "enable"]

NAME = "mla_kernels"
"""Name of the attention and experts implementations in transformers' registries."""

DECODE_TOKENS = 16
"""Up to so many new tokens a sequence go through ``mla_decode``; more are a prefill and go through transformers' sdpa.

Absorbed attention costs about 3.4 times the multiplications of expanded K and V for each pair of query and key, and
saves their expansion, which is shared by the queries of one call.
"""

_BASE_MODELS = (_v2.DeepseekV2Model, _v3.DeepseekV3Model)
_ATTENTIONS = (_v2.DeepseekV2Attention, _v3.DeepseekV3Attention)
_EXPERTS = (_v2.DeepseekV2Experts, _v3.DeepseekV3Experts)
_FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention function: ``mla_decode`` for a few new tokens, sdpa on expanded K and V otherwise.

    query [batch, heads, tokens, nope + rope]; key and value are what ``LatentLayer.update`` returned. Returns
    [batch, tokens, heads, v].
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if "expand_kv" not in vars(module):  # not an enabled module: K and V arrive expanded
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = getattr(key, "latent_layer", None)
    tokens = query.shape[2]
    if layer is None or tokens > DECODE_TOKENS or layer._new_kept is not None or dropout > 0:
        if layer is not None and layer.length > tokens:
            if torch.is_grad_enabled() and query.requires_grad:
                raise NotImplementedError("the latent cache keeps no gradients: pass use_cache=False to train")
            key, value = layer.keys, layer.values
        keys, values = type(module).expand_kv(module, key, value)
        return sdpa(module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    nope = module.qk_nope_head_dim
    kv_b = _kv_b_weight(module).view(query.shape[1], -1, module.kv_lora_rank)  # [heads, nope + v, latent]
    q_nope, q_rope = query.split((nope, query.shape[-1] - nope), -1)
    q = torch.cat((absorb_query(q_nope.transpose(1, 2), kv_b), q_rope.transpose(1, 2)), -1)
    out, _ = mla_decode(q, layer.cache, layer.block_table, layer.seq_lens, softmax_scale=float(scaling), causal=True)
    return expand_output(out, kv_b, nope), None


def _keep_latents(latents, rotated):
    """Stands in for ``expand_kv`` of an enabled module, so that the attention function receives the latents."""
    return latents, rotated


def _kv_b_weight(module) -> torch.Tensor:
    if type(module.kv_b_proj) is not nn.Linear:
        raise TypeError(
            f"kv_b_proj of layer {module.layer_idx}: got {type(module.kv_b_proj).__name__}, torch.nn.Linear is "
            "accepted (merge adapters and dequantise first: decoding absorbs its weight into the query)"
        )
    return module.kv_b_proj.weight


# ---------------------------------------------------------------------------------------------------------------------
# Experts

_plain_experts: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _experts(self, hidden_states, top_k_index, top_k_weights):
    """transformers' experts function: hidden [tokens, hidden], ids and weights [tokens, top_k].

    Ids outside the module's experts (expert-parallel sentinels) are skipped.
    """
    if self not in _plain_experts:
        reason = _why_not_plain(self)
        if reason:
            raise NotImplementedError(f"experts_implementation='{NAME}' cannot run {type(self).__name__}: {reason}")
        _plain_experts.add(self)
    return fused_moe(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_weights.float(), top_k_index.to(torch.int32)
    )


def _why_not_plain(experts: nn.Module) -> str | None:
    """Why these experts are not ``down(silu(gate) * up)`` over [E, 2I, H] and [E, H, I] weights; None if they are."""
    wanted = {
        "has_gate": (True, "experts without a gate"),
        "has_bias": (False, "expert biases"),
        "is_transposed": (False, "weights stored as [experts, in, out]"),
        "is_concatenated": (True, "gate and up rows interleaved"),
        "has_post_expert_norm": (False, "a norm after each expert"),
    }
    for name, (value, meaning) in wanted.items():
        if getattr(experts, name, value) != value:
            return f"{meaning} ({name}={getattr(experts, name)})"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or weight.dtype not in FLOATS:
            return f"{name} is not one [experts, out, in] tensor of bfloat16, float16 or float32"
    # The gate is code, so it is probed: on values past every clamp in use, and past silu's curve.
    gate = torch.tensor([-1e3, -60.0, -11.0, -7.5, -1.0, -0.1, 0.0, 0.3, 2.0, 7.5, 11.0, 60.0, 1e3])
    up = torch.tensor([-1e3, -11.0, -7.5, -0.7, 0.0, 0.7, 7.5, 11.0, 1e3])
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(gate, up, indexing="ij"))
    packed = torch.cat((gate, up), -1).to(experts.down_proj.device)
    with torch.no_grad():
        got = experts._apply_gate(packed)
    if got.shape != gate.shape or not torch.allclose(got.cpu(), F.silu(gate) * up, rtol=1e-5, atol=1e-6):
        return "its gate is not silu(gate) * up (a clamp, another activation, or another order)"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Switching a model


@dataclass
class _Switch:
    """What ``disable`` gives back."""

    attention: str
    experts: str
    hook: torch.utils.hooks.RemovableHandle


def enable(model):
    """Run ``model`` over this library from now on, and return it. Enabling twice changes nothing.

    Greedy, sampled, beam and assisted generation, left-padded batches and manual decode loops give what they gave
    before, up to rounding. A cache that transformers filled is taken over. For inference: the ops have no backward.

    Args:
        model: a DeepSeek-V2 or V3 model of transformers (``DeepseekV2ForCausalLM``, ``DeepseekV3Model``, ...) in
            bfloat16, float16 or float32.

    Raises:
        TypeError: another class, or layers (quantised, adapters) whose weights cannot be read.
        NotImplementedError: experts that are not plain SwiGLU, or a transformers without ``expand_kv``.
        ValueError: a latent or rope width that is no power of two of at least 16.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, _BASE_MODELS):
        accepted = ", ".join(cls.__name__ for cls in _BASE_MODELS)
        raise TypeError(
            f"enable: got {type(model).__name__}, accepted are the models of transformers built on {accepted}, for "
            "example DeepseekV2ForCausalLM and DeepseekV3ForCausalLM"
        )
    if NAME in vars(model):
        return model
    attentions = [module for module in model.modules() if isinstance(module, _ATTENTIONS)]
    for module in attentions:
        if not hasattr(type(module), "expand_kv"):
            raise NotImplementedError(
                f"enable: transformers {_TRANSFORMERS_VERSION} has no {type(module).__name__}.expand_kv, which 5.23 has"
            )
        _kv_b_weight(module)
    LatentCache.allocate(0, 64, latent_dim=base.config.kv_lora_rank, rope_dim=base.config.qk_rope_head_dim)
    for module in model.modules():
        if isinstance(module, _EXPERTS) and (reason := _why_not_plain(module)):
            raise NotImplementedError(f"enable: {type(module).__name__} cannot be fused: {reason}")
    switch = _Switch(
        attention=model.config._attn_implementation,
        experts=model.config._experts_implementation,
        hook=base.register_forward_pre_hook(_prepare_cache, with_kwargs=True),
    )
    for module in attentions:
        module.expand_kv = _keep_latents
    model.set_attn_implementation(NAME)
    model.set_experts_implementation(NAME)
    vars(model)[NAME] = switch
    return model


def disable(model):
    """Give ``model`` transformers' own attention, experts and cache back, and return it.

    A model that is not enabled stays as it is. A cache filled while it was enabled is refused by its next forward.
    """
    switch = vars(model).pop(NAME, None)
    if switch is None:
        return model
    switch.hook.remove()
    for module in model.modules():
        if isinstance(module, _ATTENTIONS):
            with contextlib.suppress(KeyError):
                del vars(module)["expand_kv"]
    model.set_attn_implementation(switch.attention)
    model.set_experts_implementation(switch.experts)
    return model


def _prepare_cache(base, args, kwargs):
    """Before a forward of the base model: make its cache one of latent layers, and tell them what is padding."""
    kwargs = {**dict(zip(_FORWARD_ARGUMENTS, args)), **kwargs}
    use_cache = kwargs.get("use_cache")
    cache = kwargs.get("past_key_values")
    if cache is None and (base.config.use_cache if use_cache is None else use_cache):
        cache = kwargs["past_key_values"] = Cache(layers=[LatentLayer() for _ in range(base.config.num_hidden_layers)])
    if cache is None:
        return (), kwargs
    inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    tokens = inputs.shape[1]
    mask, past = kwargs.get("attention_mask"), cache.get_seq_length()
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(f"attention_mask: got {shape}, [batch, past and new tokens] or None is accepted")
    if mask is not None and mask.shape[1] != past + tokens:
        raise ValueError(f"attention_mask: got {mask.shape[1]} tokens, {past} past and {tokens} new ones are accepted")
    mask = None if mask is None else mask.to(torch.bool)
    _adopt(cache, base.config.num_hidden_layers, None if mask is None else mask[:, :past])
    first = cache.layers[0]
    if mask is None and first.kept is not None:
        raise ValueError("attention_mask: got None, but the cache holds padding; pass the mask of all tokens")
    if mask is not None and past and mask.device.type == "cpu":
        before = first.kept if first.kept is not None else torch.ones_like(mask[:, :past])
        if not torch.equal(before, mask[:, :past]):
            raise ValueError("attention_mask: it masks cached tokens in another way than when they were stored")
    new = None if mask is None or bool(mask[:, past:].all()) else mask[:, past:]
    for layer in cache.layers:
        layer.expect(new if new is None else new.to(getattr(layer, "device", new.device)))
    return (), kwargs


def _adopt(cache, num_layers: int, kept: torch.Tensor | None) -> None:
    """Turn a cache of transformers' dynamic layers into one of latent layers, in place."""
    if all(isinstance(layer, LatentLayer) for layer in cache.layers) and len(cache.layers) >= num_layers:
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise NotImplementedError(
            f"past_key_values: got {'an offloaded ' if getattr(cache, 'offloading', False) else ''}"
            f"{type(cache).__name__}, accepted: None, DynamicCache, or a Cache of LatentLayer"
        )
    filled = list(cache.layers)
    cache.layers = [LatentLayer() for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    for old, new in zip(filled, cache.layers):
        if old.get_seq_length():
            new.expect(None if kept is None or bool(kept.all()) else kept.to(old.keys.device))
            new.update(old.keys, old.values)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
