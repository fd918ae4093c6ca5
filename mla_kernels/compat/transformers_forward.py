"""Around a forward of an enabled base model: its cache becomes one of latent layers, which know what is padding."""

import inspect
from functools import partial

import torch
from transformers import Cache, DynamicCache
from transformers import __version__ as _VERSION

from mla_kernels.compat.transformers_attention import NAME, has_prefill, is_marked, mark
from mla_kernels.compat.transformers_cache import LatentLayer

_CACHE_KEYWORDS = ("cache", "past_key_values")
"""What transformers calls the cache: from 5.24 on, and before."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def cache_keyword(cls: type) -> str:
    """What the forward of this class calls its cache; NotImplementedError: none of the names that are known here."""
    names = inspect.signature(cls.forward).parameters
    for name in _CACHE_KEYWORDS:
        if name in names:
            return name
    raise NotImplementedError(
        f"enable: {cls.__name__}.forward of transformers {_VERSION} takes its cache by none of the names that are "
        f"known here: {', '.join(_CACHE_KEYWORDS)}"
    )


def install_hooks(base) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Prepare the cache before every forward of this model from now on, and look after it that it arrived."""
    names, keyword = positional_names(type(base)), cache_keyword(type(base))
    return (
        base.register_forward_pre_hook(partial(_prepare_cache, names, keyword), with_kwargs=True),
        base.register_forward_hook(partial(_check_cache_arrived, keyword), with_kwargs=True),
    )


def positional_names(cls: type) -> tuple[str, ...]:
    """The positional arguments of this class's forward."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in _POSITIONAL)


def as_keywords(base, names: tuple[str, ...], keyword: str, args, kwargs) -> dict | None:
    """A call's arguments as keywords; None where Python has an error for the call."""
    if base.config._attn_implementation != NAME:
        raise RuntimeError(
            f"this model is enabled, but its attention implementation was set to {base.config._attn_implementation!r} "
            "since; call mla_kernels.compat.transformers.disable(model) first"
        )
    if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        return None
    kwargs = {**dict(zip(names, args)), **kwargs}
    if kwargs.get(keyword) is None and kwargs.get("past_key_values") is not None:  # the name that is being phased out
        kwargs[keyword] = kwargs.pop("past_key_values")
    return kwargs


def _prepare_cache(names: tuple[str, ...], keyword: str, base, args, kwargs):
    """A forward pre-hook: what the base model is to be called with. ``names`` are its positional arguments'."""
    kwargs = as_keywords(base, names, keyword, args, kwargs)
    if kwargs is None:
        return None
    cache = kwargs.get(keyword)
    if cache is None and base.training and any(layer.gradient_checkpointing for layer in base.layers):
        kwargs["use_cache"] = False  # transformers' layers would not take one
    use_cache = kwargs.get("use_cache")
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
    traced = torch.compiler.is_compiling()  # then nobody can look at values
    if mask is not None and past and mask.device.type == "cpu" and not traced:
        before = first.kept if first.kept is not None else torch.ones_like(mask[:, :past])
        if not torch.equal(before, mask[:, :past]):
            raise ValueError("attention_mask: it masks cached tokens in another way than when they were stored")
    new = None if mask is None or (not traced and bool(mask[:, past:].all())) else mask[:, past:]
    for layer in cache.layers:
        kept = None if new is None else new.to(getattr(layer, "device", new.device))
        layer.expect(kept, differentiable=differentiable)
    packs = tokens == 1 or new is None or not traced  # else the number of real tokens would be needed
    if not differentiable and has_prefill(base.config) and packs:
        # These ops know what is causal and what is padding. In place of transformers' [batch, 1, tokens, keys], a view.
        keys = torch.ones(1, 1, dtype=torch.bool, device=inputs.device) if mask is None else mask
        kwargs["attention_mask"] = mark(keys[:, None, None].expand(batch, 1, tokens, past + tokens))
    return (), kwargs


def _check_cache_arrived(keyword: str, base, args, kwargs, output) -> None:
    """A forward hook: where the mask was left to the layers of the cache, each attention must have met its layer."""
    if not is_marked(kwargs.get("attention_mask")):
        return
    layers = kwargs[keyword].layers[: base.config.num_hidden_layers]
    if missed := [index for index, layer in enumerate(layers) if layer.awaits_update]:
        raise RuntimeError(
            f"{type(base).__name__} of transformers {_VERSION} took {keyword}, but the attention of layers {missed} "
            "stored no token there: this result is not to be used; call mla_kernels.compat.transformers.disable(model)"
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
