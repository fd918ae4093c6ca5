"""Around a forward of an enabled base model: its cache becomes one of latent layers, which know what is padding."""

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Cache, DynamicCache
from transformers import __version__ as _VERSION

from mla_kernels.compat.transformers_attention import (
    MASK_OF_CHOICE,
    NAME,
    expands_windows,
    has_prefill,
    is_marked,
    mark,
)
from mla_kernels.compat.transformers_cache import LatentLayer

_CACHE_KEYWORDS = ("cache", "past_key_values")
"""What transformers calls the cache: from 5.24 on, and before."""
_LINEAR = "linear_attention"
"""The type of the layers that are transformers' own, with a cache of their own kind."""
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


@dataclass(frozen=True)
class _Plan:
    """What stands in the layers of a base model."""

    keyword: str
    latent: tuple[int, ...]  # the layers that store latents, or an indexer's keys alone
    has_prefill: bool  # whether mla_prefill has tiles for all of them
    window_latent: int  # the widest latent of the layers with a window; 0: there is none
    masks_itself: bool  # whether the attention makes its mask by itself from what an indexer chose
    pools: bool  # whether an indexer chooses pools of tokens

    @classmethod
    def of(cls, base, attentions) -> "_Plan":
        shares = (getattr(module, "is_kv_shared_layer", False) and module.indexer is None for module in attentions)
        return cls(
            keyword=cache_keyword(type(base)),
            latent=tuple(sorted(module.layer_idx for module, other in zip(attentions, shares) if not other)),
            has_prefill=all(has_prefill(module) for module in attentions),
            window_latent=max((m.kv_lora_rank for m in attentions if getattr(m, "sliding_window", None)), default=0),
            masks_itself=any(hasattr(type(module), MASK_OF_CHOICE) for module in attentions),
            pools=hasattr(base.config, "index_kpool"),
        )


def install_hooks(base, attentions) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Prepare the cache before every forward of this model from now on, and look after it that it arrived. What a
    forward that raises has stored is forgotten.

    ``attentions`` are its modules of latent attention."""
    names, plan = positional_names(type(base)), _Plan.of(base, attentions)
    return (
        base.register_forward_pre_hook(partial(_prepare_cache, names, plan), with_kwargs=True),
        base.register_forward_hook(partial(_finish, plan), with_kwargs=True, always_call=True),
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


def _prepare_cache(names: tuple[str, ...], plan: _Plan, base, args, kwargs):
    """A forward pre-hook: what the base model is to be called with. ``names`` are its positional arguments'."""
    keyword = plan.keyword
    kwargs = as_keywords(base, names, keyword, args, kwargs)
    if kwargs is None:
        return None
    cache = kwargs.get(keyword)
    if cache is None and base.training and any(layer.gradient_checkpointing for layer in base.layers):
        kwargs["use_cache"] = False  # transformers' layers would not take one
    use_cache = kwargs.get("use_cache")
    if cache is None and (base.config.use_cache if use_cache is None else use_cache):
        cache = kwargs[keyword] = Cache(layers=_new_layers(base.config, plan.latent))
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
    _adopt(plan, cache, base.config, None if mask is None else mask[:, :past])
    latent = [cache.layers[index] for index in plan.latent]
    if latent[0].lost:
        raise RuntimeError(
            f"{keyword}: an earlier forward with this cache raised when layers of linear attention had taken its "
            "tokens into their states; begin with a new cache"
        )
    if hasattr(base.config, "index_topk") and len({layer.page_size for layer in latent}) > 1:
        raise ValueError(f"{keyword}: got layers of several page sizes, one is accepted with an indexer")
    differentiable = torch.is_grad_enabled() and (
        inputs.requires_grad or any(parameter.requires_grad for parameter in base.parameters())
    )
    if past and differentiable:
        raise NotImplementedError(
            f"{keyword}: the latent cache keeps no gradients: pass use_cache=False to train, or decode under "
            "torch.no_grad()"
        )
    first = latent[0]
    if mask is None and first.kept is not None:
        raise ValueError("attention_mask: got None, but the cache holds padding; pass the mask of all tokens")
    traced = torch.compiler.is_compiling()  # then nobody can look at values
    if mask is not None and past and mask.device.type == "cpu" and not traced:
        before = first.kept if first.kept is not None else torch.ones_like(mask[:, :past])
        if not torch.equal(before, mask[:, :past]):
            raise ValueError("attention_mask: it masks cached tokens in another way than when they were stored")
    new = None if mask is None or (not traced and bool(mask[:, past:].all())) else mask[:, past:]
    splits = plan.pools and mask is not None and (traced or bool((mask[:, :-1] & ~mask[:, 1:]).any()))
    for layer in latent:
        kept = None if new is None else new.to(getattr(layer, "device", new.device))
        layer.expect(kept, differentiable=differentiable, splits=splits)
    packs = tokens == 1 or new is None or not traced  # else the number of real tokens would be needed
    by_ops = plan.has_prefill and not plan.masks_itself and not expands_windows(plan.window_latent, inputs.device)
    if not differentiable and by_ops and packs:
        # These ops know what is causal and what is padding. In place of transformers' [batch, 1, tokens, keys], a view.
        keys = torch.ones(1, 1, dtype=torch.bool, device=inputs.device) if mask is None else mask
        marked = mark(keys[:, None, None].expand(batch, 1, tokens, past + tokens))
        kwargs["attention_mask"] = marked
        if _LINEAR in _kinds(base.config):  # those need to know which tokens are real
            kwargs["attention_mask"] = {"full_attention": marked, _LINEAR: None if tokens == 1 else new}
    return (), kwargs


def _finish(plan: _Plan, base, args, kwargs, output) -> None:
    """A forward hook, which also runs where the forward raised: then ``output`` is None."""
    cache = kwargs.get(plan.keyword)
    if cache is None or len(cache.layers) <= plan.latent[-1]:
        latent = []
    else:
        latent = [layer for index in plan.latent if isinstance(layer := cache.layers[index], LatentLayer)]
    if output is None:
        _undo(plan, base, cache, [layer for layer in latent if layer.before is not None])
        return
    for layer in latent:
        layer.before = None
    _check_cache_arrived(plan, base, kwargs.get("attention_mask"), cache)


def _undo(plan: _Plan, base, cache, latent: list) -> None:
    """Bring the cache back to what it was before the forward: its ``latent`` layers that were told of it."""
    if not latent:
        return
    past = max(layer.before for layer in latent)
    for layer in latent:
        layer.undo()
    linear = [index for index, kind in enumerate(_kinds(base.config)) if kind == _LINEAR]
    if linear and past:
        cache.layers[plan.latent[0]].lost = True
    elif linear:
        fresh = _new_layers(base.config, plan.latent)
        for index in linear:
            cache.layers[index] = fresh[index]


def _check_cache_arrived(plan: _Plan, base, mask, cache) -> None:
    """Where the mask was left to the layers of the cache, each attention must have met its layer."""
    left = is_marked(mask.get("full_attention") if isinstance(mask, dict) else mask)
    if not left and (cache is None or not plan.masks_itself):
        return
    if missed := [index for index in plan.latent if cache.layers[index].awaits_update]:
        raise RuntimeError(
            f"{type(base).__name__} of transformers {_VERSION} took {plan.keyword}, but the attention of layers "
            f"{missed} stored no token there: this result is not to be used; call "
            "mla_kernels.compat.transformers.disable(model)"
        )


def _kinds(config) -> list[str]:
    """The types of a model's layers, where it has several."""
    return getattr(config, "layer_types", None) or []


def _new_layers(config, latent: tuple[int, ...]) -> list:
    """Empty layers of a cache: latent ones, and in between those that transformers would take."""
    if len(latent) == config.num_hidden_layers:
        return [LatentLayer() for _ in latent]
    return [
        LatentLayer() if index in latent else layer for index, layer in enumerate(DynamicCache(config=config).layers)
    ]


def _adopt(plan: _Plan, cache, config, kept: torch.Tensor | None) -> None:
    """Turn a cache's dynamic layers into latent ones, in place, where the model's attention is latent."""
    filled = list(cache.layers)
    is_latent = [isinstance(layer, LatentLayer) for layer in filled]
    if len(filled) >= config.num_hidden_layers and all(is_latent[index] for index in plan.latent):
        others = [index for index in range(config.num_hidden_layers) if index not in plan.latent and is_latent[index]]
        if others:
            raise ValueError(
                f"{plan.keyword}: got latent layers at {others}, where this model has none; pass None or a DynamicCache"
            )
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise NotImplementedError(
            f"{plan.keyword}: got {'an offloaded ' if getattr(cache, 'offloading', False) else ''}"
            f"{type(cache).__name__}, accepted: None, DynamicCache, or a Cache of LatentLayer"
        )
    for index in plan.latent:
        if index < len(filled) and getattr(filled[index], "is_sliding", False) and filled[index].get_seq_length():
            raise NotImplementedError(
                f"{plan.keyword}: got a filled {type(filled[index]).__name__}, an empty one is accepted: it holds no "
                "token before its window"
            )
    cache.layers = _new_layers(config, plan.latent)
    cache.layer_class_to_replicate = None
    for index, old in enumerate(filled[: config.num_hidden_layers]):
        if index not in plan.latent:
            cache.layers[index] = old
            continue
        new, stored = cache.layers[index], getattr(old, "indexer_keys", None)
        present = old.keys if old.get_seq_length() else stored
        if present is None:
            continue
        new.expect(None if kept is None or bool(kept.all()) else kept.to(present.device))
        if old.get_seq_length():
            new.update(old.keys, old.values)
        if stored is not None:
            new.update_indexer(stored)
