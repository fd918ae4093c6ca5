"""Hyper-connections of transformers' decoder layers over this library's ops.

The forward of a decoder layer is replaced. Its norms go into ``hyper_pre`` and ``hyper_post_pre``, and its modules are
called for attention and experts alone. Without gradients a layer ends with what the next one begins with, so that two
launches stand around each of its halves; that one finds it in :class:`Handed`. Connections and norms that are more than
transformers' own (hooks, adapters, sharded or offloaded weights) are called as transformers calls them.

Symbols: B batch, S tokens of a sequence, T = B S, N streams, H hidden size.
"""

import inspect
import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from mla_kernels.checks import FLOATS
from mla_kernels.compat.transformers_weights import class_of, forward_name, is_called_plainly
from mla_kernels.hyper.finish import MOST_HIDDEN
from mla_kernels.hyper.form import MOST_ITERATIONS, MOST_STREAMS, HyperForm
from mla_kernels.hyper.op import hyper_head, hyper_post, hyper_post_pre, hyper_pre
from mla_kernels.nn.hyper import form_of

_PLAIN = (torch.Tensor, nn.Parameter)  # to ask a tensor for attributes that it lacks takes longer than all the rest

HANDED = "mla_kernels_handed"
"""The keyword by which :class:`Handed` reaches the layers."""

_CHECKPOINTS_CALLS = "__call__" in vars(GradientCheckpointingLayer)
"""Whether transformers checkpoints a layer's calls. From 5.24 on it does so inside its forward, which is replaced."""
_log = logging.get_logger(__name__)

_NOT_OF_LINEAR = ("position_ids", "use_cache", "position_embeddings", "prev_topk_indices")
"""What transformers' layers do not give to linear attention."""


class Handed:
    """What one layer has computed for the next one, in one forward of a model of these ``layers``."""

    def __init__(self, layers: tuple[nn.Module, ...]):
        self.layers, self.given = layers, None

    def take(self, layer, streams):
        """(row, post, comb) of these very streams, if the layer before this one left them; else None."""
        given, self.given = self.given, None
        return given[2] if given is not None and given[0] is layer and given[1] is streams else None

    def behind(self, index: int):
        """The layer behind layer ``index``, if nobody looks at the streams in between, who might change them."""
        if index + 1 == len(self.layers):
            return None
        layer, following = self.layers[index : index + 2]
        return None if layer._forward_hooks or following._forward_pre_hooks else following


@dataclass(frozen=True)
class _Half:
    """How one half of any layer reads the streams: a connection, and the norm behind it."""

    connection: str
    norm: str
    form: HyperForm
    forwards: tuple  # transformers', of these two

    def read(self, layer, streams):
        """Of streams [B, S, N, H]: the row behind the norm [B, S, H], post [T, N] and comb [T, N, N] or None."""
        weights = self.weights(layer, streams)
        if weights is None:
            return self._call(layer, streams)
        norm = self._norm_weight(layer, streams)
        row, post, comb = hyper_pre(streams.flatten(0, 1), *weights, form=self.form, norm_weight=norm)
        return self._normed(layer, row, norm, streams), post, comb

    def step(self, layer, weights, streams, out, post, comb):
        """:func:`_write`, then :meth:`read` of what that gives: (new streams, row, post, comb). ``weights``: of
        :meth:`weights`."""
        if weights is None:
            new = _write(streams, out, post, comb)
            return new, *self._call(layer, new)
        norm = self._norm_weight(layer, streams)
        options = {"form": self.form, "norm_weight": norm}
        new, row, post, comb = hyper_post_pre(*_flat(streams, out), post, comb, *weights, **options)
        return new.view(streams.shape), self._normed(layer, row, norm, streams), post, comb

    def weights(self, layer, streams):
        """fn, base and scale in float32; None where the module is to be called."""
        module = getattr(layer, self.connection)
        if not is_called_plainly(module, self.forwards[0]):
            return None
        return _plain_floats((module.fn, module.base, module.scale), streams.device)

    def _norm_weight(self, layer, streams):
        module = getattr(layer, self.norm)
        if not is_called_plainly(module, self.forwards[1]) or module.variance_epsilon != self.form.norm_eps:
            return None
        weight = module.weight
        if _plain_floats((weight,), streams.device) is None or weight.dtype not in (streams.dtype, torch.float32):
            return None
        return weight

    def _normed(self, layer, row, norm, streams):
        row = row.view(*streams.shape[:2], -1)
        return row if norm is not None else getattr(layer, self.norm)(row)

    def _call(self, layer, streams):
        post, *comb, row = getattr(layer, self.connection)(streams)
        comb = comb[0].float().flatten(0, 1) if comb else None
        return getattr(layer, self.norm)(row), post.float().flatten(0, 1), comb


@dataclass(frozen=True)
class _Plan:
    """What the forward of any layer of a model knows."""

    attention: _Half
    feed_forward: _Half
    defaults: dict  # of its positional arguments behind the streams
    gives_choice: bool  # whether it returns what its indexer chose, too


def replacements(base, family: str):
    """(module, method, function) for each method that an instance is to shadow: none where the ops do not take the
    model's sizes."""
    if not _fits(base.config):
        return
    form = form_of(base.config)
    for index, layer in enumerate(_layers(base, family)):
        if index == 0:
            cls = class_of(layer, family + "DecoderLayer")
            home = sys.modules[cls.__module__]
            forwards = tuple(getattr(home, family + kind).forward for kind in ("HyperConnection", "RMSNorm"))
            parameters = list(inspect.signature(cls.forward).parameters.values())[2:]
            defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
            halves = (("attn_hc", "input_layernorm"), ("ffn_hc", "post_attention_layernorm"))
            halves = (_Half(*names, form, forwards) for names in halves)
            plan = _Plan(*halves, defaults, "prev_topk_indices" in defaults)
        yield layer, forward_name(layer), partial(layer_forward, plan, index, layer)
    for head in base.modules():
        cls = class_of(head, family + "HyperHead")
        if cls is not None and type(head).forward is cls.forward:
            yield head, forward_name(head), partial(head_forward, form, cls.forward, head)


def install_hooks(base, family: str) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Let the layers hand over to each other in every forward without gradients, if it is transformers' own."""
    model, layers = class_of(base, family + "Model"), tuple(_layers(base, family))
    every = sum(class_of(module, family + "DecoderLayer") is not None for module in base.modules())
    if not _fits(base.config) or type(base).forward is not model.forward or len(layers) != every:
        return ()
    return (base.register_forward_pre_hook(partial(_offer, layers), with_kwargs=True),)


def _offer(layers, base, args, kwargs):
    """A forward pre-hook."""
    return None if torch.is_grad_enabled() else (args, {**kwargs, HANDED: Handed(layers)})


def layer_forward(plan: _Plan, index: int, layer, hidden_states, *args, **kwargs):
    """Stands in for the forward of a decoder layer: hidden_states [B, S, N, H] -> the same, with what an indexer chose
    where transformers' layer returns that."""
    kwargs = {**plan.defaults, **dict(zip(plan.defaults, args)), **kwargs}
    if not _CHECKPOINTS_CALLS and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        if kwargs.get("cache") is not None:
            _log.warning_once(f"{type(layer).__name__}: a cache cannot be filled under gradient checkpointing")
        kwargs |= {name: None if name == "cache" else False for name in ("cache", "use_cache") if name in kwargs}
        return layer._gradient_checkpointing_func(partial(_forward, plan, index, layer, **kwargs), hidden_states)
    return _forward(plan, index, layer, hidden_states, **kwargs)


def _forward(plan: _Plan, index: int, layer, streams, **kwargs):
    handed = kwargs.pop(HANDED, None)
    begun = None if handed is None else handed.take(layer, streams)
    row, post, comb = plan.attention.read(layer, streams) if begun is None else begun
    if plan.gives_choice:
        (out, choice), options = _attend(layer, row, kwargs), {}
    else:
        options = {"input_ids": kwargs.pop("input_ids")}
        out, _ = layer.self_attn(row, **kwargs)
    weights = plan.feed_forward.weights(layer, streams)
    streams, row, post, comb = plan.feed_forward.step(layer, weights, streams, out, post, comb)
    out = layer.mlp(row, **options)
    following = None if handed is None else handed.behind(index)
    weights = None if following is None else plan.attention.weights(following, streams)
    if weights is None:
        streams = _write(streams, out, post, comb)
    else:
        streams, *begun = plan.attention.step(following, weights, streams, out, post, comb)
        handed.given = following, streams, begun
    return (streams, choice) if plan.gives_choice else streams


def _attend(layer, row, kwargs):
    """(attention's result, what its indexer chose), with the keywords that transformers' layer gives it."""
    if getattr(layer, "block_type", None) != "linear_attention":
        out, _, choice = layer.self_attn(hidden_states=row, **kwargs)
        return out, choice
    kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_OF_LINEAR}
    if "past_key_values" in kwargs:  # before 5.24
        kwargs["cache_params"] = kwargs.pop("past_key_values")
    return layer.self_attn(hidden_states=row, **kwargs), None


def head_forward(form: HyperForm, own, head, streams):
    """Stands in for the head's forward, ``own``: streams [B, S, N, H] -> [B, S, H]."""
    weights = ()
    if hasattr(head, "hc_fn"):
        weights = _plain_floats((head.hc_fn, head.hc_base, head.hc_scale), streams.device)
        if weights is None:
            return own(head, streams)
    row = hyper_head(streams.flatten(0, 1), *weights, collapse="sigmoid" if weights else "mean", form=form)
    return row.view(*streams.shape[:2], -1)


def _write(streams, out, post, comb):
    return hyper_post(*_flat(streams, out), post, comb).view(streams.shape)


def _flat(streams, out):
    """[T, N, H] and [T, H], of one dtype: under autocast attention gives another than its streams have."""
    return streams.flatten(0, 1), out.flatten(0, 1).to(streams.dtype)


def _plain_floats(tensors, device) -> list[torch.Tensor] | None:
    """The tensors in float32, dense; None: one wraps others (sharded, quantised) or lies elsewhere (offloaded)."""
    for one in tensors:
        wraps = type(one) not in _PLAIN and (hasattr(one, "to_local") or hasattr(one, "__tensor_flatten__"))
        if wraps or one.dtype not in FLOATS or one.device != device:
            return None
    return [one.float().contiguous() for one in tensors]


def _fits(config) -> bool:
    """Whether the ops take the model's hyper-connections, on every chip."""
    return (
        config.hc_mult <= MOST_STREAMS
        and config.hidden_size <= min(MOST_HIDDEN.values())
        and getattr(config, "hc_sinkhorn_iters", 1) <= MOST_ITERATIONS
        and config.hc_eps > 0
    )


def _layers(base, family: str):
    """The decoder layers whose class has transformers' forward, in order."""
    for module in base.modules():
        cls = class_of(module, family + "DecoderLayer")
        if cls is not None and inspect.unwrap(type(module).forward) is inspect.unwrap(cls.forward):
            yield module
