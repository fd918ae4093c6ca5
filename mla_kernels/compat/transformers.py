"""MLA models of Hugging Face transformers over this library's ops.

``enable(model)`` makes a loaded model keep its latents in paged :class:`LatentCache` buffers, decode in the latent
space with ``mla_decode``, and run its experts with ``fused_moe``; ``disable(model)`` gives it transformers' own code
back. Both use transformers' public hooks (``AttentionInterface``, ``AttentionMaskInterface``, ``ExpertsInterface``,
cache layers) and torch's forward hooks. One undocumented method is needed, ``expand_kv`` of the attention modules;
where it is missing, ``enable`` says so.

The attention and experts functions are registered as ``"mla_kernels"`` when this module is imported, so
``model.set_experts_implementation("mla_kernels")`` alone works on any model whose experts use SwiGLU,
with or without a clamp.
"""

import types
from dataclasses import dataclass, field

import torch
from torch import nn

from mla_kernels.checks import check_choice
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import LAYOUTS, IndexerCache
from mla_kernels.quant.cache_layout import QUANTISED

OLDEST, NEXT = (5, 18), (5, 25)
"""The first version of transformers that this module takes, and the first one after them."""

try:
    from transformers import __version__ as _VERSION
except ModuleNotFoundError as error:
    raise ImportError(
        "mla_kernels.compat.transformers needs transformers 5.18 or newer: pip install 'mla_kernels[transformers]'"
    ) from error
if not OLDEST <= tuple(int(part) for part in _VERSION.split(".")[:2]) < NEXT:
    raise ImportError(
        f"mla_kernels.compat.transformers takes transformers from 5.18 to 5.24, not {_VERSION}: pip install "
        "'transformers>=5.18,<5.25'"
    )

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402

from mla_kernels.compat import transformers_hyper, transformers_v4  # noqa: E402
from mla_kernels.compat.transformers_attention import MASK_OF_CHOICE, NAME, attention, keep_choice, keep_latents  # noqa: E402
from mla_kernels.compat.transformers_cache import LatentLayer  # noqa: E402
from mla_kernels.compat.transformers_experts import experts, experts_with_identity, why_not_fused  # noqa: E402
from mla_kernels.compat.transformers_forward import cache_keyword, install_hooks  # noqa: E402
from mla_kernels.compat.transformers_indexer import (  # noqa: E402
    choose_slots,
    choose_slots_by_position,
    choose_slots_interleaved,
    choose_slots_rotated_last,
)
from mla_kernels.compat.transformers_packed import PLACE, check_packable, pack  # noqa: E402
from mla_kernels.compat.transformers_pools import choose_pools  # noqa: E402
from mla_kernels.compat.transformers_weights import absorbed_weight, can_shadow, class_of, shadow  # noqa: E402

__all__ = ["FAMILIES", "NAME", "Family", "LatentLayer", "disable", "enable"]


@dataclass(frozen=True)
class Family:
    """One model family of transformers: the names of its classes, and what stands in for their methods."""

    base: str
    attention: str  # its expand_kv is replaced
    experts: str | None = None
    experts_forward: types.FunctionType | None = None  # where the class ignores transformers' ExpertsInterface
    indexer: str | None = None
    indexer_forward: types.FunctionType | None = None
    hyper: str | None = None  # what the names of its layers and hyper-connections begin with
    kinds: tuple[str, ...] = ()
    """Layer types besides full_attention and indexed_attention: linear ones stay transformers' own, sliding ones are
    latent attention with a window."""


LINEAR, SLIDING = ("linear_attention",), ("sliding_attention",)
V4 = Family("DeepseekV4Model", "DeepseekV4Attention", "DeepseekV4Experts", hyper="DeepseekV4")
"""DeepSeek-V4, whose attention is no latent one: its caches, masks and attention stand in files of their own."""

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
    Family("AXK1Model", "AXK1Attention", "AXK1Experts"),
    Family("AXK2Model", "AXK2Attention", "AXK2Experts", indexer="AXK2Indexer", indexer_forward=choose_slots),
    Family(
        "HYV4Model",
        "HYV4Attention",
        "HYV4Experts",
        indexer="HYV4Indexer",
        indexer_forward=choose_slots_rotated_last,
        hyper="HYV4",
    ),
    Family(
        "MistralLarge4TextModel",
        "MistralLarge4TextAttention",
        "MistralLarge4TextExperts",
        indexer="MistralLarge4TextIndexer",
        indexer_forward=choose_slots_by_position,
    ),
    Family(
        "Dots3NoteTextModel",
        "Dots3NoteTextAttention",
        "Dots3NoteExperts",
        indexer="Dots3NoteTextIndexer",
        indexer_forward=choose_slots_interleaved,
        kinds=SLIDING,
    ),
    Family("KimiLinearModel", "KimiLinearAttention", "KimiLinearExperts", kinds=LINEAR),
    Family("BailingHybridModel", "BailingHybridAttention", "BailingHybridExperts", kinds=LINEAR),
    Family(
        "Glm5NextTextModel",
        "Glm5NextTextAttention",
        "Glm5NextTextExperts",
        indexer="Glm5NextTextIndexer",
        indexer_forward=choose_pools,
        hyper="Glm5NextText",
        kinds=LINEAR,
    ),
)


@dataclass
class _Switch:
    """What ``disable`` gives back."""

    attention: str
    experts: str
    hooks: tuple[torch.utils.hooks.RemovableHandle, ...]
    layouts: tuple[str | None, str]  # of DeepSeek-V4's caches
    replaced: list[tuple[nn.Module, str, types.FunctionType | None]] = field(default_factory=list)
    """Module, name and the method of its own that it had, for the methods that are shadowed."""


def enable(model, *, prepack: bool = False, cache_layout: str | None = None, index_layout: str | None = None):
    """Run ``model`` over this library from now on, and return it. Enabling twice changes nothing.

    Greedy, sampled, beam and assisted generation, left-padded batches and manual decode loops give what they gave
    before, up to rounding. A cache that transformers filled is taken over. What runs where:

    - The cache is paged latents (``LatentLayer``), without room for padding. Layers of linear attention keep
      transformers' own states in the same cache; layers with a window keep every token.
    - Up to ``DECODE_TOKENS`` new tokens a sequence attend with ``mla_decode`` in the latent space. More are a prefill:
      ``mla_prefill`` over expanded K and V, or transformers' sdpa where that op has no tiles for the head's widths.
    - An indexer's scores and choice run in ``select_slots`` over paged indexer keys. Past its top_k, tokens attend
      with ``sparse_mla_decode`` or ``sparse_mla_prefill``; where its scores tie, it may choose another key. A forward
      hook on the indexer sees cache slots, where transformers' own has positions. GLM-5-next's indexer chooses pools of
      tokens, whose keys are kept likewise; where padding stands between tokens it is transformers' own.
    - Past a window a prefill is ``sparse_mla_prefill`` over it; windows over latents of more than 512 columns attend
      with transformers' sdpa on devices. Sinks are scores of their own in every case.
    - Forwards without a cache, or that record gradients, attend with ``mla_prefill`` where the mask is plain causal,
      else with transformers' sdpa; an indexer is transformers' own there. Gradients do not reach cached tokens.
    - DeepSeek-V4's attention is :class:`mla_kernels.nn.V4Attention`'s, over a cache of ``V4Layer``. Padding is left out
      of it: a left-padded prompt gives what it gives alone, where transformers' compressors take padding for tokens.
    - Experts run in ``fused_moe``, forward and backward; with ``prepack`` forward only.
    - Decoder layers with hyper-connections (DeepSeek-V4, HY-V4, GLM-5-next) run ``hyper_pre``, ``hyper_post_pre`` and
      ``hyper_post`` around attention and experts, their two norms included, and the head ``hyper_head``, forward and
      backward, in float32. Connections and norms with hooks or adapters, and weights that are sharded or offloaded,
      are called as transformers calls them; more than 4 streams, more than 64 iterations and hidden sizes past 8,192
      stay transformers' own code, and so does a layer whose class has a forward of its own.
    - Projections, other norms, rotary embeddings, routers, dense and shared MLPs and linear attention are transformers'
      own code throughout.

    Decoding absorbs the weight of ``kv_b_proj`` into the query and does not call that module. Parametrizations of the
    weight act; adapters around the module, forward hooks and other forwards are refused, also where they come later.

    Models that transformers sharded over processes (``tp_plan``, ``ep_plan``, FSDP2) stay so, and generate what one
    process does; tensor parallel ones train so, too. A rank attends with its own heads and holds every token's latents.
    Enable the model on every rank.

    ``torch.compile(fullgraph=True)`` takes inference without a cache, prefills and decode steps. Values of a mask
    cannot be looked at there: a prefill under a mask attends with transformers' sdpa, and a mask that contradicts the
    cache is not refused. ``generate`` compiles nothing by itself, since this cache grows.

    In float16 sums are float32 and what an op returns is rounded, so that values beyond 65,504 become inf, as in
    transformers. The absorbed query and the weighted latents are roundings that transformers does not have.

    ``prepack`` moves the experts' weights, for inference on a CPU, out of their parameters: on processors with AMX
    (Intel) into huge pages, elsewhere into oneDNN's layout. They take the same memory as before, and one parameter's
    more while they are moved; a storage that something else holds, too, is not freed. The documentation's page on
    performance says what it gains; moving a layer takes seconds. Until ``disable``, which gives the same parameters the
    same bits back, they are empty ([0, out, in]): ``state_dict()``, copies of the model, other experts implementations
    and forwards that would record gradients are refused, and ``torch.compile`` breaks its graph there (with
    ``fullgraph=True`` it says so). ``prepack=True`` also packs a model that is enabled already.

    Args:
        model: a model of transformers in bfloat16, float16 or float32, built on one of ``FAMILIES`` or ``V4``:
            DeepSeek-V2, V3, V3.2 and V4, GLM-MoE-DSA, GLM-4-MoE-Lite, GLM-5-next, MiniCPM3, Mistral 4, Mistral Large 4,
            Youtu, LongCat-Flash, A.X-K1 and K2, HY-V4, dots3-note, Kimi-Linear, Bailing-hybrid
            (``DeepseekV2ForCausalLM``, ``MiniCPM3Model``, ...), or a module that holds such a model: of
            ``Kimi_K25ForConditionalGeneration`` the language model is enabled, and the rest stays as it is.
        prepack: move the experts' weights, bfloat16 or float32 on the CPU, of a model in eval mode.
        cache_layout: how DeepSeek-V4's caches hold raw tokens and entries: ``"fp8_v4"`` (584 bytes where bfloat16 takes
            1,024), ``"fp8_v32"`` or ``"int8"``, of a model in bfloat16, on every chip. None: 16 or 32 bits, as the
            model's dtype is, or what an enabled model has. Prompts attend at the model's precision; what comes later
            reads the cache.
        index_layout: how they hold the indexer's keys: ``"fp8"`` (132 bytes for 256), or ``"bf16"``, the model's dtype.
            None: ``"bf16"``, or what an enabled model has.

    Raises:
        TypeError: another class, or layers (quantised, adapters) whose weights cannot be read; ``prepack`` is no bool,
            or experts of another dtype; a ``cache_layout`` of a model that is not in bfloat16.
        NotImplementedError: experts that are not SwiGLU, sliding windows or layers of several configurations in other
            families than dots3-note, forward hooks on ``kv_b_proj``, methods that another library has replaced, a stage
            of a pipeline, or a transformers without ``expand_kv`` or with another name for the cache; a layout for
            caches of another family than DeepSeek-V4.
        ValueError: a latent or rope width that is no power of two of at least 16, or an indexer's width that is none
            from 16 to 256; a layout that a layer cannot hold, or another than an enabled model has. With ``prepack``:
            training mode, experts on another device, not contiguous or shared.
    """
    if not isinstance(prepack, bool):
        raise TypeError(f"prepack: got {type(prepack).__name__}, a bool is accepted")
    bases = _bases(model)
    if not bases:
        accepted = ", ".join(family.base for family in (*FAMILIES, V4))
        raise TypeError(
            f"enable: got {type(model).__name__}, accepted are the models of transformers built on {accepted}, for "
            "example DeepseekV2ForCausalLM and DeepseekV3ForCausalLM, and those that hold one of these"
        )
    _check_layouts(bases, cache_layout, index_layout)
    todo = [(base, family, list(_replacements(base, family))) for base, family in bases if NAME not in vars(base)]
    if prepack:
        packable = [(base, _experts_to_pack(base, family)) for base, family in bases]
        for base, modules in packable:
            check_packable(base, modules)
        pack(module for _, modules in packable for module in modules)
    for base, family, replacements in todo:
        switch = _Switch(
            attention=base.config._attn_implementation,
            experts=base.config._experts_implementation,
            hooks=_install_hooks(base, family, cache_layout, index_layout or "bf16"),
            layouts=(cache_layout, index_layout or "bf16"),
        )
        for module, name, function in replacements:
            switch.replaced.append((module, name, vars(module).get(name)))
            shadow(module, name, function)
        base.set_attn_implementation(NAME)
        base.set_experts_implementation(NAME)
        vars(base)[NAME] = switch
    return model


def disable(model):
    """Give ``model`` transformers' own attention, experts and cache back, and return it.

    A model that is not enabled stays as it is. A cache filled while it was enabled is refused by its next forward.
    """
    for base, _ in _bases(model):
        switch = vars(base).pop(NAME, None)
        if switch is None:
            continue
        for module in base.modules():
            if PLACE in vars(module):
                vars(module)[PLACE].restore()
        for hook in switch.hooks:
            hook.remove()
        for module, name, before in switch.replaced:
            del vars(module)[name]
            if before is not None:
                setattr(module, name, before)
        base.set_attn_implementation(switch.attention)
        base.set_experts_implementation(switch.experts)
    return model


def _is_a(module, name: str | None) -> bool:
    """Whether the module is of transformers' class ``name``, or of one derived from it."""
    return class_of(module, name) is not None


def _bases(model) -> list[tuple[nn.Module, Family]]:
    """The base models of a family in this model: itself, its body, or the language model inside a multimodal one."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    pairs = ((module, family) for module in modules for family in (*FAMILIES, V4))
    return [(module, family) for module, family in pairs if _is_a(module, family.base)]


def _experts_to_pack(base, family: Family) -> list[nn.Module]:
    return [module for module in base.modules() if _is_a(module, family.experts) and PLACE not in vars(module)]


def _check_config(config, family: Family) -> None:
    windows = SLIDING[0] in family.kinds
    if config.is_heterogeneous and not windows:
        raise NotImplementedError("enable: got layers of several configurations (per_layer_config), one is accepted")
    if family.indexer is not None:
        IndexerCache.allocate(0, 64, head_dim=config.index_head_dim)
    accepted = ("full_attention", "indexed_attention", *family.kinds)
    kinds = set(getattr(config, "layer_types", None) or ()).difference(accepted)
    window = None
    if not windows:
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if kinds or window:
        raise NotImplementedError(
            f"enable: got layer types {sorted(kinds)}, window {window}; attention to the whole context is accepted "
            f"(layer_types {' or '.join(accepted)}, no sliding_window, no attention_chunk_size)"
        )


def _check_layouts(bases, cache_layout: str | None, index_layout: str | None) -> None:
    """Refuse layouts of caches that are none, that a family does not have, or that an enabled model has not."""
    if cache_layout is not None:
        check_choice("cache_layout", cache_layout, QUANTISED)
    if index_layout is not None:
        check_choice("index_layout", index_layout, LAYOUTS)
    for base, family in bases:
        for name, wanted, place in (("cache_layout", cache_layout, 0), ("index_layout", index_layout, 1)):
            if wanted is None:
                continue
            if family is not V4:
                raise NotImplementedError(
                    f"{name}: got {wanted!r} for {type(base).__name__}, whose cache has the model's dtype; None is "
                    f"accepted, and layouts by {V4.base}"
                )
            if NAME in vars(base) and vars(base)[NAME].layouts[place] != wanted:
                raise ValueError(
                    f"{name}: got {wanted!r}, the model is enabled with {vars(base)[NAME].layouts[place]!r}; call "
                    "disable(model) first"
                )
        if family is V4:
            transformers_v4.check_layouts(base, cache_layout, index_layout or "bf16")


def _install_hooks(base, family: Family, *layouts) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    if family is V4:
        hooks = transformers_v4.install_hooks(base, *layouts)
    else:
        hooks = install_hooks(base, [module for module in base.modules() if _is_a(module, family.attention)])
    return hooks if family.hyper is None else (*hooks, *transformers_hyper.install_hooks(base, family.hyper))


def _replacements(base, family: Family):
    """(module, method, function) for each method that an instance is to shadow; refusals before anything changes."""
    if family is V4:
        own = list(transformers_v4.replacements(base))
    else:
        _check_config(base.config, family)
        own = []
    if family.hyper is not None:
        own += transformers_hyper.replacements(base, family.hyper)
    cache_keyword(type(base))
    yield from (_unless_replaced(*one) for one in own)
    for module in base.modules():
        if type(module).__name__ == "PipelineIdentityLayer":
            raise NotImplementedError(
                f"enable: this {type(base).__name__} is one stage of a pipeline of transformers, whole models are "
                "accepted (tensor parallel ones too)"
            )
        if _is_a(module, family.attention):
            if family is V4:
                continue
            if not hasattr(type(module), "expand_kv"):
                raise NotImplementedError(
                    f"enable: transformers {_VERSION} has no {type(module).__name__}.expand_kv, which 5.24 has"
                )
            cache_keyword(type(module))
            LatentCache.allocate(0, 64, latent_dim=module.kv_lora_rank, rope_dim=module.qk_rope_head_dim)
            absorbed_weight(module)
            yield _unless_replaced(module, "expand_kv", keep_latents)
            if hasattr(type(module), MASK_OF_CHOICE):
                yield _unless_replaced(module, MASK_OF_CHOICE, keep_choice)
        elif _is_a(module, family.experts):
            if reason := why_not_fused(module):
                raise NotImplementedError(f"enable: {type(module).__name__} cannot be fused: {reason}")
            if family.experts_forward is not None:
                yield _unless_replaced(module, "forward", types.MethodType(family.experts_forward, module))
        elif _is_a(module, family.indexer):
            yield _unless_replaced(module, "forward", types.MethodType(family.indexer_forward, module))


def _unless_replaced(module, name: str, function):
    if not can_shadow(module, name):
        raise NotImplementedError(
            f"enable: {type(module).__name__}.{name} of this model was replaced by other code (device hooks of "
            "accelerate, for example); remove it first"
        )
    return module, name, function


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
