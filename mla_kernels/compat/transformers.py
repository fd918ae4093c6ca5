"""MLA models of Hugging Face transformers over this library's ops.

``enable(model)`` makes a loaded model keep its latents in paged :class:`LatentCache` buffers, decode in the latent
space with ``mla_decode``, and run its experts with ``fused_moe``; ``disable(model)`` gives it transformers' own code
back. Both use transformers' public hooks (``AttentionInterface``, ``AttentionMaskInterface``, ``ExpertsInterface``,
cache layers) and a torch forward pre-hook. One undocumented method is needed, ``expand_kv`` of the attention modules;
where it is missing, ``enable`` says so.

The attention and experts functions are registered as ``"mla_kernels"`` when this module is imported, so
``model.set_experts_implementation("mla_kernels")`` alone works on any model whose experts use SwiGLU,
with or without a clamp.
"""

import inspect
import types
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer_cache import IndexerCache

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
    from transformers import __version__ as _TRANSFORMERS_VERSION
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    from mla_kernels.compat.transformers_attention import attention, has_prefill, keep_latents, kv_b_weight
    from mla_kernels.compat.transformers_cache import LatentLayer
    from mla_kernels.compat.transformers_experts import experts, experts_with_identity, why_not_fused
    from mla_kernels.compat.transformers_indexer import choose_slots, choose_slots_interleaved
except ImportError as error:
    raise ImportError(
        "mla_kernels.compat.transformers needs transformers 5.15 or newer: pip install 'mla_kernels[transformers]'"
    ) from error

__all__ = ["FAMILIES", "NAME", "Family", "LatentLayer", "disable", "enable"]

NAME = "mla_kernels"
"""Name of the attention and experts implementations in transformers' registries."""


@dataclass(frozen=True)
class Family:
    """One model family of transformers: the names of its classes, and what stands in for their methods."""

    base: str
    attention: str  # its expand_kv is replaced
    experts: str | None = None
    experts_forward: types.FunctionType | None = None  # where the class ignores transformers' ExpertsInterface
    indexer: str | None = None
    indexer_forward: types.FunctionType | None = None


FAMILIES = (
    Family("DeepseekV2Model", "DeepseekV2Attention", "DeepseekV2Experts"),
    Family("DeepseekV3Model", "DeepseekV3Attention", "DeepseekV3Experts"),
    Family(
        "DeepseekV32Model",
        "DeepseekV32Attention",
        "DeepseekV32Experts",
        indexer="DeepseekV32Indexer",
        indexer_forward=choose_slots,
    ),
    Family(
        "GlmMoeDsaModel",
        "GlmMoeDsaAttention",
        "GlmMoeDsaExperts",
        indexer="GlmMoeDsaIndexer",
        indexer_forward=choose_slots_interleaved,
    ),
    Family("Glm4MoeLiteModel", "Glm4MoeLiteAttention", "Glm4MoeLiteExperts"),
    Family("MiniCPM3Model", "MiniCPM3Attention"),
    Family("Mistral4Model", "Mistral4Attention", "Mistral4Experts"),
    Family("YoutuModel", "YoutuAttention"),
    Family("LongcatFlashModel", "LongcatFlashMLA", "LongcatFlashExperts", experts_with_identity),
)
_CACHE_KEYWORDS = ("cache", "past_key_values")  # what transformers calls the cache since 5.24, and before


@dataclass
class _Switch:
    """What ``disable`` gives back."""

    attention: str
    experts: str
    hooks: tuple[torch.utils.hooks.RemovableHandle, ...]
    replaced: list[tuple[nn.Module, str]] = field(default_factory=list)  # methods that instances shadow


def enable(model):
    """Run ``model`` over this library from now on, and return it. Enabling twice changes nothing.

    Greedy, sampled, beam and assisted generation, left-padded batches and manual decode loops give what they gave
    before, up to rounding. A cache that transformers filled is taken over. What runs where:

    - The cache is paged latents (``LatentLayer``), without room for padding.
    - Up to ``DECODE_TOKENS`` new tokens a sequence attend with ``mla_decode`` in the latent space. More are a prefill:
      ``mla_prefill`` over expanded K and V, or transformers' sdpa where that op has no tiles for the head's widths.
    - An indexer's scores and choice run in ``select_slots`` over paged indexer keys. Past its top_k, tokens attend
      with ``sparse_mla_decode`` or ``sparse_mla_prefill``; where its scores tie, it may choose another key.
    - Forwards without a cache, or that record gradients, attend with ``mla_prefill`` where the mask is plain causal,
      else with transformers' sdpa; an indexer is transformers' own there. Gradients do not reach cached tokens.
    - Experts run in ``fused_moe``, forward and backward.
    - Projections, norms, rotary embeddings, routers, dense and shared MLPs are transformers' own code throughout.

    Args:
        model: a model of transformers in bfloat16, float16 or float32, built on one of ``FAMILIES``: DeepSeek-V2, V3
            and V3.2, GLM-MoE-DSA, GLM-4-MoE-Lite, MiniCPM3, Mistral4, Youtu, LongCat-Flash
            (``DeepseekV2ForCausalLM``, ``MiniCPM3Model``, ...).

    Raises:
        TypeError: another class, or layers (quantised, adapters) whose weights cannot be read.
        NotImplementedError: experts that are not SwiGLU, sliding windows, methods that another library has
            replaced, or a transformers without ``expand_kv``.
        ValueError: a latent or rope width that is no power of two of at least 16, or an indexer's width that is none
            from 16 to 256.
    """
    base = getattr(model, "base_model", None)
    family = _family(base)
    if family is None:
        accepted = ", ".join(family.base for family in FAMILIES)
        raise TypeError(
            f"enable: got {type(model).__name__}, accepted are the models of transformers built on {accepted}, for "
            "example DeepseekV2ForCausalLM and DeepseekV3ForCausalLM"
        )
    if NAME in vars(model):
        return model
    _check_config(base.config)
    replacements = list(_replacements(model, family))
    for module, name, _ in replacements:
        if name in vars(module):
            raise NotImplementedError(
                f"enable: {type(module).__name__}.{name} of this model was replaced by other code (device hooks of "
                "accelerate, for example); remove it first"
            )
    arguments, keyword = _forward_arguments(base)
    switch = _Switch(
        attention=model.config._attn_implementation,
        experts=model.config._experts_implementation,
        hooks=(
            base.register_forward_pre_hook(partial(_prepare_cache, arguments, keyword), with_kwargs=True),
            base.register_forward_hook(partial(_check_cache_arrived, keyword), with_kwargs=True),
        ),
    )
    for module, name, function in replacements:
        setattr(module, name, function)
        switch.replaced.append((module, name))
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
    for hook in switch.hooks:
        hook.remove()
    for module, name in switch.replaced:
        vars(module).pop(name, None)
    model.set_attn_implementation(switch.attention)
    model.set_experts_implementation(switch.experts)
    return model


def _is_a(module, name: str | None) -> bool:
    """Whether the module is of transformers' class ``name``, or of one derived from it."""
    return any(cls.__name__ == name and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def _family(base) -> Family | None:
    return next((family for family in FAMILIES if _is_a(base, family.base)), None)


def _check_config(config) -> None:
    LatentCache.allocate(0, 64, latent_dim=config.kv_lora_rank, rope_dim=config.qk_rope_head_dim)
    if hasattr(config, "index_head_dim"):
        IndexerCache.allocate(0, 64, head_dim=config.index_head_dim)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "indexed_attention"}
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if kinds or window:
        raise NotImplementedError(
            f"enable: got layer types {sorted(kinds)}, window {window}; attention to the whole context is accepted "
            "(layer_types full_attention or indexed_attention, no sliding_window, no attention_chunk_size)"
        )


def _replacements(model, family: Family):
    """(module, method, function) for each method that an instance is to shadow; refusals before anything changes."""
    for module in model.modules():
        if _is_a(module, family.attention):
            if not hasattr(type(module), "expand_kv"):
                raise NotImplementedError(
                    f"enable: transformers {_TRANSFORMERS_VERSION} has no {type(module).__name__}.expand_kv, which "
                    "5.23 has"
                )
            kv_b_weight(module)
            yield module, "expand_kv", keep_latents
        elif _is_a(module, family.experts):
            if reason := why_not_fused(module):
                raise NotImplementedError(f"enable: {type(module).__name__} cannot be fused: {reason}")
            if family.experts_forward is not None:
                yield module, "forward", types.MethodType(family.experts_forward, module)
        elif _is_a(module, family.indexer):
            yield module, "forward", types.MethodType(family.indexer_forward, module)


def _forward_arguments(base) -> tuple[tuple[str, ...], str]:
    """Names of the arguments of the base model's forward, in order, and which of them is the cache."""
    arguments = tuple(inspect.signature(type(base).forward).parameters)[1:]
    keyword = next((name for name in _CACHE_KEYWORDS if name in arguments), None)
    if keyword is None:
        raise NotImplementedError(
            f"enable: {type(base).__name__}.forward of transformers {_TRANSFORMERS_VERSION} takes its cache by none of "
            f"the names that are known here: {', '.join(_CACHE_KEYWORDS)}"
        )
    return arguments, keyword


def _prepare_cache(arguments: tuple[str, ...], keyword: str, base, args, kwargs):
    """Before a forward of the base model: make its cache one of latent layers, and tell them what is padding."""
    kwargs = {**dict(zip(arguments, args)), **kwargs}
    use_cache = kwargs.get("use_cache")
    if kwargs.get(keyword) is None and kwargs.get("past_key_values") is not None:  # transformers still takes this name
        kwargs[keyword] = kwargs.pop("past_key_values")
    cache = kwargs.get(keyword)
    if cache is None and (base.config.use_cache if use_cache is None else use_cache):
        cache = kwargs[keyword] = Cache(layers=[LatentLayer() for _ in range(base.config.num_hidden_layers)])
    if cache is None:
        return (), kwargs
    inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    batch, tokens = inputs.shape[:2]
    mask, past = kwargs.get("attention_mask"), cache.get_seq_length()
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(f"attention_mask: got {shape}, [batch, past and new tokens] or None is accepted")
    if mask is not None and mask.shape[1] != past + tokens:
        raise ValueError(f"attention_mask: got {mask.shape[1]} tokens, {past} past and {tokens} new ones are accepted")
    mask = None if mask is None else mask.to(torch.bool)
    _adopt(keyword, cache, base.config.num_hidden_layers, None if mask is None else mask[:, :past])
    if hasattr(base.config, "index_topk") and len({layer.page_size for layer in cache.layers}) > 1:
        raise ValueError(f"{keyword}: got layers of several page sizes, one is accepted with an indexer")
    differentiable = torch.is_grad_enabled() and (
        inputs.requires_grad or any(parameter.requires_grad for parameter in base.parameters())
    )
    if past and differentiable:
        raise NotImplementedError(
            f"{keyword}: the latent cache keeps no gradients: pass use_cache=False to train, or decode under "
            "torch.no_grad()"
        )
    first = cache.layers[0]
    if mask is None and first.kept is not None:
        raise ValueError("attention_mask: got None, but the cache holds padding; pass the mask of all tokens")
    if mask is not None and past and mask.device.type == "cpu":
        before = first.kept if first.kept is not None else torch.ones_like(mask[:, :past])
        if not torch.equal(before, mask[:, :past]):
            raise ValueError("attention_mask: it masks cached tokens in another way than when they were stored")
    new = None if mask is None or bool(mask[:, past:].all()) else mask[:, past:]
    for layer in cache.layers:
        kept = None if new is None else new.to(getattr(layer, "device", new.device))
        layer.expect(kept, differentiable=differentiable)
    if not differentiable and has_prefill(base.config):
        # These ops know what is causal and what is padding. In place of transformers' [batch, 1, tokens, keys], a view.
        keys = torch.ones(1, 1, dtype=torch.bool, device=inputs.device) if mask is None else mask
        kwargs["attention_mask"] = keys[:, None, None].expand(batch, 1, tokens, past + tokens)
    return (), kwargs


def _check_cache_arrived(keyword: str, base, args, kwargs, output) -> None:
    """After the forward: its attention must have stored what was prepared, since its mask was left to the layers."""
    cache = kwargs.get(keyword)
    if cache is not None and cache.layers[0].awaits_update:
        raise RuntimeError(
            f"{type(base).__name__} of transformers {_TRANSFORMERS_VERSION} took {keyword}, but its attention never "
            "stored a token there: this result is not to be used; call mla_kernels.compat.transformers.disable(model)"
        )


def _adopt(keyword: str, cache, num_layers: int, kept: torch.Tensor | None) -> None:
    """Turn a cache of transformers' dynamic layers into one of latent layers, in place."""
    if all(isinstance(layer, LatentLayer) for layer in cache.layers) and len(cache.layers) >= num_layers:
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise NotImplementedError(
            f"{keyword}: got {'an offloaded ' if getattr(cache, 'offloading', False) else ''}"
            f"{type(cache).__name__}, accepted: None, DynamicCache, or a Cache of LatentLayer"
        )
    filled = list(cache.layers)
    cache.layers = [LatentLayer() for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    for old, new in zip(filled, cache.layers):
        if old.get_seq_length():
            new.expect(None if kept is None or bool(kept.all()) else kept.to(old.keys.device))
            new.update(old.keys, old.values)
            if getattr(old, "indexer_keys", None) is not None:
                new.update_indexer(old.indexer_keys)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
