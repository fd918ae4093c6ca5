"""DeepSeek-V4 of Hugging Face transformers over :class:`mla_kernels.nn.V4Attention`: caches, masks and attention.

Left padding: transformers' own compressors take padding for tokens, so that its results of a padded prompt differ from
those of the same prompt alone. Here padding is left out, and a padded prompt has the results that it has alone.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import Cache, DynamicCache

from mla_kernels.compat.transformers_cache import even_starts, starts
from mla_kernels.compat.transformers_forward import as_keywords, cache_keyword, positional_names
from mla_kernels.compat.transformers_v4_cache import PAGE, STEP, V4Book, V4Layer
from mla_kernels.nn import V4Attention, V4AttentionConfig, V4Cache

PLACES = "mla_kernels_places"
"""The keyword by which a forward's places reach the attention modules."""

_NOT_CALLED = ("compressor", "indexer", "q_a_norm", "kv_norm")
"""Modules whose weights ops read, and whose forward does not run, or not always."""

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class V4Places:
    """Where the tokens of one forward stand. ``kept`` bool [batch, tokens], False where padding; None: no padding."""

    tables: dict
    kept: torch.Tensor | None
    past: int
    book: V4Book | None
    layers: list | None
    ratios: tuple[int, ...]
    differentiable: bool
    shared: dict  # what the layers compute once

    def attend(self, core: V4Attention, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The attention of one layer: hidden [batch, tokens, hidden_size] -> the same."""
        tables = self.tables[core.config.rope]
        caches = None if self.layers is None else self.layers[index].reserve(hidden)
        if caches is None or self.past == 0:
            return self._whole(core, hidden, tables, caches)
        if hidden.shape[1] > STEP and not torch.compiler.is_compiling():
            self.layers[index].save()
        if self.kept is None:
            return self._chunk(core, hidden, tables, caches, slice(None))
        out = torch.zeros_like(hidden, dtype=caches.window.dtype)  # each sequence has new tokens of its own number
        for sequence, kept in enumerate(self.kept):
            rows = slice(sequence, sequence + 1)
            out[rows, kept] = self._chunk(core, hidden[rows, kept], tables, caches, rows)
        return out

    def _whole(self, core, hidden, tables, caches):
        """Sequences from their first token on, packed; into the caches, too, if there are any."""
        batch, tokens = hidden.shape[:2]
        if self.kept is None:
            rows, bounds = hidden.flatten(0, 1), even_starts(batch, tokens, hidden.device)
        else:
            rows, bounds = hidden[self.kept], starts(self.kept.sum(-1))
        if caches is None or self.differentiable:
            out = core(rows, *tables, bounds, max_seqlen=tokens)
        if caches is not None:
            make = partial(self._prompt_slots, bounds, rows.shape[0], core.config)
            sequences, slots = self._once("prefill", make)
            given = *tables, bounds, slots, caches, sequences
            if self.differentiable:
                core.write(rows, *given, max_seqlen=tokens)
            else:
                out = core.prefill(rows, *given, max_seqlen=tokens)
        if self.kept is None:
            return out.view(hidden.shape)
        padded = torch.zeros_like(hidden, dtype=out.dtype)
        padded[self.kept] = out
        return padded

    def _prompt_slots(self, bounds, tokens: int, config):
        """The book's sequences, and the slots of packed prompts: of their last window alone, which the ring holds."""
        sequences = self.book.sequences(self.ratios, self.book.seq_lens, slice(None))
        row = torch.arange(tokens, dtype=torch.int32, device=bounds.device)
        sequence = torch.searchsorted(bounds[1:].contiguous(), row, right=True)
        position = row - bounds[sequence]
        slots = self.book.slots(sequences, position[None].expand(len(bounds) - 1, -1))
        slots = slots.gather(0, sequence[None])[0]
        return sequences, torch.where(position < self.book.seq_lens[sequence] - config.window, -1, slots)

    def _chunk(self, core, hidden, tables, caches, rows: slice):
        """New tokens of sequences that have a past, STEP at a time: hidden [sequences, tokens, hidden_size]."""
        count, outs = hidden.shape[1], []
        for first in range(0, count, STEP):
            part = hidden[:, first : first + STEP]
            tokens = part.shape[1]
            make = partial(self._chunk_slots, rows, tokens, count - first - tokens)
            sequences, slots = self._once((rows.start, first), make)
            outs.append(core.decode(part, *tables, slots, caches, sequences))
        return torch.cat(outs, 1) if len(outs) != 1 else outs[0]

    def _chunk_slots(self, rows: slice, tokens: int, left: int):
        sequences = self.book.sequences(self.ratios, self.book.seq_lens[rows] - left, rows)
        return sequences, self.book.slots(sequences, sequences.positions(tokens))

    def _once(self, key, make):
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


def attention_forward(core: V4Attention, module, hidden_states, *args, **kwargs):
    """Stands in for ``DeepseekV4Attention.forward`` of ``module``, with whose weights ``core`` works."""
    places = kwargs.get(PLACES)
    if places is None:
        raise RuntimeError(
            f"{type(module).__name__} of layer {module.layer_idx} is enabled, but was not called by its model's "
            "forward; call mla_kernels.compat.transformers.disable(model) to use it alone"
        )
    if module.training and module.attention_dropout > 0:
        raise NotImplementedError(
            f"attention dropout: got {module.attention_dropout} in training, 0 is accepted for DeepSeek-V4"
        )
    _share(core, module)
    return places.attend(core, module.layer_idx, hidden_states), None


def _share(core, module) -> None:
    """Make ``core`` work with the parameters and the submodules that transformers' ``module`` has now."""
    for name, parameter in core._parameters.items():
        if parameter is not module._parameters[name]:
            core._parameters[name] = module._parameters[name]
    for name, child in core._modules.items():
        other = module._modules[name]
        if name in _NOT_CALLED and (other._forward_hooks or other._forward_pre_hooks):
            raise NotImplementedError(
                f"enable: {type(other).__name__} ({name}) has forward hooks, which would not run, since its forward "
                "does not"
            )
        if name in ("compressor", "indexer"):
            _share(child, other)
        elif child is not other:
            core._modules[name] = other


def check_layouts(base, layout: str | None, index_layout: str) -> None:
    """Refuse a layout that a layer of the model cannot hold."""
    if layout is None and index_layout == "bf16":
        return
    for index, config in enumerate(_configs(base)):
        options = {"dtype": base.dtype, "layout": layout, "index_layout": index_layout, "device": "meta"}
        try:
            V4Cache.allocate(config, num_pages=0, page_size=PAGE, slots=0, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"cache_layout: got {layout!r}, which layer {index} ({config.layer_type}) cannot hold: {error}"
            ) from None


def replacements(base):
    """(module, method, function) for each method that an instance is to shadow; refusals before anything changes."""
    config = base.config
    if config.is_heterogeneous:
        raise NotImplementedError("enable: got layers of several configurations (per_layer_config), one is accepted")
    for name, kind in base.rotary_emb.rope_type.items():
        if kind not in _STATIC_ROPE:
            raise NotImplementedError(f"enable: got rope_type {kind!r} ({name}), accepted: {', '.join(_STATIC_ROPE)}")
    for module in base.modules():
        if type(module).__name__ == "DeepseekV4Attention":
            with torch.device("meta"):
                core = V4Attention(V4AttentionConfig.from_hf(config, module.layer_idx))
            _share(core, module)
            yield module, "forward", partial(attention_forward, core, module)


def install_hooks(base, layout: str | None, index_layout: str) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Prepare the cache, and the places of all tokens, before every forward of this model from now on. What a forward
    that raises has stored is forgotten."""
    plan = _Plan(
        positional_names(type(base)), cache_keyword(type(base)), _configs(base), {},
        {"layout": layout, "index_layout": index_layout},
    )  # fmt: skip
    return (
        base.register_forward_pre_hook(partial(_prepare, plan), with_kwargs=True),
        base.register_forward_hook(_finish, with_kwargs=True, always_call=True),
    )


def _configs(base) -> tuple[V4AttentionConfig, ...]:
    return tuple(V4AttentionConfig.from_hf(base.config, index) for index in range(base.config.num_hidden_layers))


@dataclass(frozen=True)
class _Plan:
    """What the hooks of a base model know of it."""

    names: tuple[str, ...]  # positional arguments of its forward
    keyword: str  # what it calls its cache
    configs: tuple[V4AttentionConfig, ...]
    known: dict  # tables of angles that were made
    layouts: dict  # of caches that it begins


def _finish(base, args, kwargs, output) -> None:
    """A forward hook, which also runs where the forward raised: then ``output`` is None."""
    places = kwargs.get(PLACES)
    if places is None or places.book is None:
        return
    for part in (places.book, *places.layers):
        if output is None:
            part.undo()
        else:
            part.finish()


def _prepare(plan: _Plan, base, args, kwargs):
    """A forward pre-hook: what the base model is to be called with."""
    keyword, configs = plan.keyword, plan.configs
    kwargs = as_keywords(base, plan.names, keyword, args, kwargs)
    if kwargs is None:
        return None  # Python has an error for this call
    inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    batch, tokens = inputs.shape[:2]
    cache = kwargs.get(keyword)
    if cache is None and base.training and any(layer.gradient_checkpointing for layer in base.layers):
        kwargs["use_cache"] = False  # transformers' layers would not take one
    use_cache = kwargs.get("use_cache")
    if cache is None and (base.config.use_cache if use_cache is None else use_cache):
        cache = kwargs[keyword] = Cache(layers=_layers(plan))
    if cache is not None:
        _adopt(plan, cache)
        cache.layers[0].check_dtype(keyword)
    past = 0 if cache is None else cache.layers[0].book.length
    mask = _mask(kwargs.get("attention_mask"), past + tokens)
    book = None if cache is None else cache.layers[0].book
    differentiable = torch.is_grad_enabled() and (
        inputs.requires_grad or any(parameter.requires_grad for parameter in base.parameters())
    )
    if past and differentiable:
        raise NotImplementedError(
            f"{keyword}: the cache keeps no gradients: pass use_cache=False to train, or decode under torch.no_grad()"
        )
    traced = torch.compiler.is_compiling()  # then nobody can look at values
    if mask is None and book is not None and book.kept is not None:
        raise ValueError("attention_mask: got None, but the cache holds padding; pass the mask of all tokens")
    if mask is not None and past and mask.device.type == "cpu" and not traced:
        before = book.kept if book.kept is not None else torch.ones_like(mask[:, :past])
        if not torch.equal(before, mask[:, :past]):
            raise ValueError("attention_mask: it masks cached tokens in another way than when they were stored")
    new = None if mask is None else mask[:, past:]
    if new is not None and ((not traced and bool(new.all())) or (traced and tokens == 1)):
        new = None
    _check_positions(kwargs.get("position_ids"), mask, past, tokens)
    ratios = tuple(sorted({config.ratio for config in configs if config.ratio}))
    tables, layers = _tables(base, plan.known, past + tokens, inputs.device), None if cache is None else cache.layers
    if book is not None:
        book.count(batch, tokens, new, inputs.device)  # last: from here on the other hook brings it back
    kwargs[PLACES] = V4Places(tables, new, past, book, layers, ratios, differentiable, {})
    kwargs["attention_mask"] = {"sliding_attention": None}  # the places know; transformers makes no mask then
    return (), kwargs


def _layers(plan: _Plan) -> list[V4Layer]:
    book = V4Book(plan.configs[0].window, **plan.layouts)
    return [V4Layer(config, book, index == 0) for index, config in enumerate(plan.configs)]


def _adopt(plan: _Plan, cache) -> None:
    """Put our layers into an empty cache of transformers."""
    keyword = plan.keyword
    if cache.layers and all(isinstance(layer, V4Layer) for layer in cache.layers):
        if [layer.config for layer in cache.layers] != list(plan.configs):
            raise ValueError(f"{keyword}: got the cache of another model, whose layers have other sizes")
        return
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length():
        kind = "an offloaded " if getattr(cache, "offloading", False) else ""
        kind = "a filled " if not kind and cache.get_seq_length() else kind
        raise NotImplementedError(
            f"{keyword}: got {kind}{type(cache).__name__}, accepted: None, an empty DynamicCache, or a cache that this "
            "model filled while it was enabled"
        )
    cache.layers = _layers(plan)
    cache.layer_class_to_replicate = None


def _mask(mask, tokens: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(f"attention_mask: got {shape}, [batch, past and new tokens] or None is accepted")
    if mask.shape[1] != tokens:
        raise ValueError(f"attention_mask: got {mask.shape[1]} tokens, {tokens} (past and new ones) are accepted")
    return mask.to(torch.bool)


def _check_positions(positions, mask, past: int, tokens: int) -> None:
    """Refuse positions that do not count the tokens of each sequence: entries stand for whole windows of them."""
    if positions is None or positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    plain = torch.arange(past, past + tokens)
    counted = plain if mask is None else torch.where(mask, mask.cumsum(-1) - 1, plain.new_tensor(-1))[:, past:]
    if bool(((positions != counted) & (counted >= 0)).any()) and bool((positions != plain).any()):
        raise NotImplementedError(
            "position_ids: got positions that do not count a sequence's tokens from 0; DeepSeek-V4's compressors take "
            "no others"
        )


def _tables(base, known: dict, length: int, device) -> dict:
    """cos and sin of each rotary embedding, fp32 [positions, rope_dim / 2], of at least ``length`` positions."""
    rotary, tables = base.rotary_emb, {}
    for name in ("main", "compress"):
        frequencies = getattr(rotary, f"{name}_inv_freq")
        held = known.get(name)
        if held is None or held[0] is not frequencies or held[1].shape[0] < length or held[1].device != device:
            rows = max(256, 1 << (length - 1).bit_length())
            angles = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequencies.float().to(device)
            scale = getattr(rotary, f"{name}_attention_scaling")
            held = frequencies, angles.cos() * scale, angles.sin() * scale
            if not torch.compiler.is_compiling():
                known[name] = held
        tables[name] = held[1:]
    return tables
