"""What a model launches: the public ops at the sizes of its layers, on any device.

Each :class:`Operation` builds one op's arguments for a geometry and sizes. On the ``meta`` device they cost nothing,
and :func:`of_model` records which kernels are launched with which constants and sizes; the launchers say it themselves,
so it cannot differ from what a model asks for. On a device they are what the online tuner times and holds against the
reference. Token counts are powers of 8 (powers of 4 for the experts), so that every count lies near one.

Chosen experts are uniform over the experts. Attention caches have pages of 64 tokens; sequences of 4,096 tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

import mla_kernels as mk
from mla_kernels.autotune import deep_gemm_problems, v4_problems
from mla_kernels.autotune.making import CHECKED, CONTEXT, PAGE, Call, Make, Operation, each
from mla_kernels.autotune.models import Geometry
from mla_kernels.launch import DTYPE_NAMES, on_cpu
from mla_kernels.moe.quantised.formats import FORMATS, WeightFormat
from mla_kernels.reference import attention, moe, prefill, prolog, quant, route, sparse
from mla_kernels.targets.chips import Chip
from mla_kernels.tiles import Problem, record

_ROPE = "interleaved_to_half"


def _route(g: Geometry, size, make: Make) -> Call:
    logits = make.normal(size["tokens"], g.experts, dtype=torch.float32)
    bias = make.normal(g.experts, dtype=torch.float32, scale=0.1) if g.bias else None
    options = dict(
        bias=bias, scoring=g.scoring, num_groups=g.groups, top_k_groups=g.top_groups, renormalize=g.renormalize
    )
    some = slice(CHECKED)
    return Call(
        lambda: mk.route(logits, g.top_k, **options)[:1],
        lambda: route.route(logits[some], g.top_k, **options)[:1],
    )


def _experts(g: Geometry, size, make: Make) -> Call:
    tokens = size["tokens"]
    hidden = make.normal(tokens, g.hidden)
    gate_up = make.normal(g.experts, 2 * g.inner, g.hidden, scale=g.hidden**-0.5)
    down = make.normal(g.experts, g.hidden, g.inner, scale=g.inner**-0.5)
    weights = make.normal(tokens, g.top_k, dtype=torch.float32).abs()
    ids = make.choices(tokens, g.top_k, g.experts)
    options = {"activation": g.activation}

    def expected():
        used, local = ids[:CHECKED].long().unique(return_inverse=True)
        parts = hidden[:CHECKED].float(), gate_up[used].float(), down[used].float(), weights[:CHECKED], local.int()
        return (moe.fused_moe(*parts, **options),)

    return Call(lambda: (mk.fused_moe(hidden, gate_up, down, weights, ids, **options),), expected)


def _quantised(format: str) -> Callable[[Geometry, dict[str, int], Make], Call]:
    def build(g: Geometry, size, make: Make) -> Call:
        tokens = size["tokens"]
        hidden, weights = make.normal(tokens, g.hidden), make.normal(tokens, g.top_k, dtype=torch.float32).abs()
        ids = make.choices(tokens, g.top_k, g.experts)
        experts = _expert_weights(g, make, format)

        def expected():
            used, local = ids[:CHECKED].long().unique(return_inverse=True)
            few = replace(experts, **{name: tensor[used] for name, tensor in experts.tensors().items()})
            parts = hidden[:CHECKED].float(), few, weights[:CHECKED], local.int()
            return (quant.fused_experts(*parts, activation=g.activation),)

        return Call(lambda: (mk.fused_experts(hidden, experts, weights, ids, activation=g.activation),), expected)

    return build


def _expert_weights(g: Geometry, make: Make, format: str) -> mk.ExpertWeights:
    sizes = {"gate_up": (2 * g.inner, g.hidden), "down": (g.hidden, g.inner)}
    if not make.bare:
        made = (make.normal(g.experts, *size, scale=size[1] ** -0.5) for size in sizes.values())
        return mk.ExpertWeights.quantise(*made, format)
    layout, group = FORMATS[WeightFormat(format)], {"int4": 128, "mxfp4": 32}.get(format)
    tensors = {"group_size": group}
    for name, (rows, columns) in sizes.items():
        layout.check_columns(name, columns, group)
        scales = make.dtype if format == "int4" else layout.scales[0]
        tensors[name] = make.normal(g.experts, rows, layout.row_length(columns), dtype=layout.codes[0])
        tensors[f"{name}_scale"] = make.normal(g.experts, *layout.scale_shape(rows, columns, group), dtype=scales)
    return mk.ExpertWeights(format, **tensors)


def _paged(g: Geometry, size, make: Make, layout: str | None):
    context, page = size.get("context", CONTEXT), size.get("page", PAGE)
    pages = -(-context // page)
    cache = mk.LatentCache.allocate(
        max(size["batch"] * pages, size.get("pool", 0) // page), page, latent_dim=g.latent or 512, rope_dim=g.rope,
        dtype=make.dtype, layout=layout, device=make.device,
    )  # fmt: skip
    if layout is None and not make.bare:
        cache.data.normal_()
    table = make.counting(size["batch"], pages)
    return cache, table, make.full(size["batch"], value=context)


def _decode(g: Geometry, size, make: Make, layout: str | None = None) -> Call:
    cache, table, lengths = _paged(g, size, make, layout)
    q = make.normal(size["batch"], size["queries"], g.heads, cache.width)
    scale = (g.nope + g.rope) ** -0.5

    def expected():
        rows = slice(2)
        wide = cache.data.float(), table[rows], lengths[rows]
        return attention.mla_decode(q[rows].float(), *wide, softmax_scale=scale, latent_dim=g.latent)

    return Call(lambda: mk.mla_decode(q, cache, table, lengths, softmax_scale=scale), expected)


def _prefill(g: Geometry, size, make: Make) -> Call:
    tokens, sequences = size["tokens"], size.get("sequences", 1)
    longest = tokens // sequences
    q = make.normal(tokens, g.heads, g.nope + g.rope)
    k, v = make.normal(tokens, g.heads, g.nope), make.normal(tokens, g.heads, g.value)
    k_rope = make.normal(tokens, g.rope) if g.rope else None
    ends = make.counting(sequences + 1) * longest
    options = dict(softmax_scale=(g.nope + g.rope) ** -0.5, causal=bool(size["causal"]))

    def expected():
        few = min(256, tokens) if size["causal"] else tokens  # the first queries see the first keys alone
        cut = make.counting(2) * few
        rotated = None if k_rope is None else k_rope[:few].float()
        parts = q[:few].float(), k[:few].float(), v[:few].float(), cut, cut
        return prefill.mla_prefill(*parts, max_seqlen_q=few, max_seqlen_k=few, k_rope=rotated, **options)

    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return Call(lambda: mk.mla_prefill(q, k, v, ends, ends, k_rope=k_rope, **lengths, **options), expected)


def _merge(g: Geometry, size, make: Make) -> Call:
    outs = make.normal(2, size["tokens"], g.heads, g.value)
    lses = make.normal(2, size["tokens"], g.heads, dtype=torch.float32)
    some = slice(CHECKED)
    return Call(
        lambda: mk.merge_states(outs, lses), lambda: attention.merge_states(outs[:, some].float(), lses[:, some])
    )


def _absorb(g: Geometry, size, make: Make) -> Call:
    q, w_uk = make.normal(size["tokens"], g.heads, g.nope + g.rope), make.normal(g.heads, g.nope, g.latent)
    cos, sin = make.angles(g.rope)
    positions = make.integers(size["tokens"], below=CONTEXT)
    some = slice(CHECKED)
    return Call(
        lambda: (mk.absorb_query(q, w_uk, cos, sin, positions, rope=_ROPE),),
        lambda: (prolog.absorb_query(q[some].float(), w_uk.float(), cos, sin, positions[some], rope=_ROPE),),
    )


def _expand(g: Geometry, size, make: Make) -> Call:
    out, w_uv = make.normal(size["tokens"], g.heads, g.latent), make.normal(g.heads, g.value, g.latent)
    return Call(
        lambda: (mk.expand_output(out, w_uv),),
        lambda: (prolog.expand_output(out[:CHECKED].float(), w_uv.float()),),
    )


def _cache(g: Geometry, size, make: Make, layout: str | None) -> mk.LatentCache:
    page = size.get("page", PAGE)
    pages = max(1, -(-size["tokens"] // page), size.get("pool", 0) // page)
    return mk.LatentCache.allocate(
        pages, page, latent_dim=g.latent, rope_dim=g.rope, dtype=make.dtype, layout=layout, device=make.device
    )


def _write(g: Geometry, size, make: Make, layout: str | None = None) -> Call:
    cache = _cache(g, size, make, layout)
    rows, norm = make.normal(size["tokens"], cache.width), make.normal(g.latent)
    where = make.integers(size["tokens"], below=CONTEXT), make.counting(size["tokens"])
    tables = make.angles(g.rope)

    def run():
        mk.write_latent(rows, norm, *tables, *where, cache, rope=_ROPE)
        return (cache.data,)

    return Call(run, None)


def _norm_and_write(g: Geometry, size, make: Make, layout: str | None = None) -> Call:
    cache = _cache(g, size, make, layout)
    where = make.integers(size["tokens"], below=CONTEXT), make.counting(size["tokens"])
    tables = make.angles(g.rope)
    q_a, q_norm = make.normal(size["tokens"], g.q_rank), make.normal(g.q_rank)
    kv_a, kv_norm = make.normal(size["tokens"], cache.width), make.normal(g.latent)
    return Call(
        lambda: (mk.norm_and_write(q_a, q_norm, kv_a, kv_norm, *tables, *where, cache, rope=_ROPE), cache.data), None
    )


def _indexer_write(g: Geometry, size, make: Make) -> Call:
    tokens = size["tokens"]
    cache = mk.IndexerCache.allocate(
        max(1, -(-tokens // PAGE)), PAGE, head_dim=g.index_width, layout="fp8", device=make.device
    )
    key, queries = make.normal(tokens, g.index_width), make.normal(tokens, g.index_heads, g.index_width)
    norm = make.normal(g.index_width, dtype=torch.float32), make.normal(g.index_width, dtype=torch.float32)
    positions, slots = make.integers(tokens, below=CONTEXT), make.counting(tokens)
    tables, weights = make.angles(g.rope), make.normal(tokens, g.index_heads, dtype=torch.float32)

    def run():
        mk.write_indexer_key(key, *norm, *tables, positions, slots, cache, rope_dim=g.rope, rope="half")
        rotated = mk.rotate_indexer_query(queries, *tables, positions, rope_dim=g.rope, rope="half")
        return rotated, mk.quantise_indexer_query(rotated, weights)[1], cache.data

    return Call(run, None)


def _select(g: Geometry, size, make: Make) -> Call:
    batch, page = size["batch"], size.get("page", PAGE)
    pages = size["keys"] // page
    room = max(batch * pages, size.get("pool", 0) // page)
    cache = mk.IndexerCache.allocate(room, page, head_dim=g.index_width, layout="fp8", device=make.device)
    if not make.bare:
        cache.keys.copy_(make.normal(*cache.keys.shape).to(torch.float8_e4m3fn).view(torch.uint8))
        cache.scales.fill_(1.0)
    q = make.normal(batch, 1, g.index_heads, g.index_width)
    weights = make.normal(batch, 1, g.index_heads, dtype=torch.float32)
    table, lengths = make.counting(batch, pages), make.full(batch, value=size["keys"])
    codes = q.to(torch.float8_e4m3fn) if size["codes"] else q

    def scores() -> torch.Tensor:
        """Of the first sequence, whose pages come first."""
        keys = cache.keys[:pages].view(torch.float8_e4m3fn).float().flatten(0, 1)
        return weights[0, 0] @ torch.relu(codes[0, 0].float() @ keys.t())

    def seen(results):
        """The chosen keys' scores: which of two keys of nearly one score is chosen may depend on a tile."""
        chosen = results[0][0].flatten()
        return (scores()[chosen[chosen >= 0].unique().long()].sort().values,)

    return Call(
        lambda: (mk.select_slots(codes, cache, weights, table, lengths, g.index_top_k),),
        lambda: (scores().topk(min(g.index_top_k, size["keys"])).values.sort().values,), seen,
    )  # fmt: skip


def _picks(g: Geometry) -> tuple[int, ...]:
    """Rows that a token of sparse attention picks; in DeepSeek-V4 a window of 128, and 512 entries beside it."""
    return (g.index_top_k,) if g.latent else (128, 512)


def _sparse(g: Geometry, size, make: Make, layout: str | None = None) -> Call:
    cache, _, _ = _paged(g, size, make, layout)
    q = make.normal(size["batch"], 1, g.heads, cache.width)
    picks, *more = (make.choices(size["batch"], count, cache.num_slots)[:, None] for count in _picks(g))
    options = dict(softmax_scale=(g.nope + g.rope) ** -0.5)
    extra, few_extra = {}, {}
    if more:
        options["sink"] = make.normal(g.heads, dtype=torch.float32)
        extra = {"extra_cache": cache, "extra_indices": more[0]}
        few_extra = {"extra_cache": cache.data.float(), "extra_indices": more[0][:2]}

    def expected():
        few = q[:2].float(), cache.data.float(), picks[:2]
        return sparse.sparse_mla_decode(*few, latent_dim=cache.latent_dim, **options, **few_extra)

    return Call(lambda: mk.sparse_mla_decode(q, cache, picks, **options, **extra), expected)


def _sparse_prefill(g: Geometry, size, make: Make) -> Call:
    tokens, width = size["tokens"], (g.latent or 512) + g.rope
    q, rows = make.normal(tokens, g.heads, width), make.normal(tokens, width)
    picks = make.choices(tokens, min(sum(_picks(g)), tokens), tokens)
    options = dict(softmax_scale=(g.nope + g.rope) ** -0.5, latent_dim=g.latent or 512)
    return Call(
        lambda: mk.sparse_mla_prefill(q, rows, picks, **options),
        lambda: sparse.sparse_mla_prefill(q[:CHECKED].float(), rows.float(), picks[:CHECKED], **options),
    )


def _has_latent(g: Geometry) -> bool:
    return g.latent > 0


def _is_sparse(g: Geometry) -> bool:
    return g.index_heads > 0 or g.latent == 0


QUANTISED = tuple(format.value for format in WeightFormat if format is not WeightFormat.PLAIN)

_TOKENS = each("tokens", 1, 8, 64, 512, 4096)
_SELECTED = (
    *each("batch", 1, 8, 64, keys=8192, codes=0),
    *each("batch", 1, keys=131072, codes=0),
    *each("batch", 1, keys=8192, codes=1),
)
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "mla_decode",
            _has_latent,
            (*each("batch", 1, 8, 64, queries=1), *each("queries", 2, 4, batch=8)),
            _decode,
        ),
        Operation("sparse_mla_decode", _is_sparse, each("batch", 1, 8, 64), _sparse),
        *(
            Operation(
                f"fused_experts {format}",
                lambda g, format=format: g.experts > 0 and format in g.formats,
                each("tokens", *(4**i for i in range(8))),
                _quantised(format),
            )
            for format in QUANTISED
        ),
        Operation("fused_moe", lambda g: g.experts > 0, each("tokens", *(4**i for i in range(8))), _experts),
        Operation("mla_prefill", _has_latent, each("causal", 1, 0, tokens=4096), _prefill),
        Operation("sparse_mla_prefill", _is_sparse, each("tokens", 4096), _sparse_prefill),
        Operation("select_slots", lambda g: g.index_heads > 0, _SELECTED, _select),
        Operation("absorb_query", _has_latent, each("tokens", 1, 8, 64, 512), _absorb),
        Operation("expand_output", _has_latent, each("tokens", 1, 8, 64, 512), _expand),
        Operation("norm_and_write", lambda g: g.latent > 0 and g.q_rank > 0, _TOKENS, _norm_and_write),
        Operation("write_latent", _has_latent, _TOKENS, _write),
        Operation("write_indexer_key", lambda g: g.index_heads > 0, _TOKENS, _indexer_write),
        Operation("rotate_heads", lambda g: g.latent == 0, _TOKENS, v4_problems.rotated_heads),
        Operation("write_kv", v4_problems.is_v4, _TOKENS, v4_problems.write_kv),
        Operation("write_windows", v4_problems.is_v4, v4_problems.WINDOWS, v4_problems.write_windows),
        Operation("write_paged_windows", v4_problems.is_v4, v4_problems.PAGED_WINDOWS, v4_problems.write_paged_windows),
        Operation("compress_windows", v4_problems.is_v4, v4_problems.COMPRESSED, v4_problems.compress_windows),
        Operation("route", lambda g: g.experts > 0, _TOKENS, _route),
        Operation("entry_slots", v4_problems.is_v4, each("sequences", 1, 64), v4_problems.entry_slots),
        Operation("hyper_post_pre", lambda g: g.streams > 0, _TOKENS, v4_problems.hyper_step),
        Operation("hyper backward", lambda g: g.streams > 0, each("tokens", 512, 4096), v4_problems.hyper_backward),
        Operation(
            "fp8_mqa_logits",
            lambda g: g.index_heads > 0,
            deep_gemm_problems.PREFILLED,
            deep_gemm_problems.row_logits("fp8"),
        ),
        Operation(
            "fp8_paged_mqa_logits",
            lambda g: g.index_heads > 0,
            deep_gemm_problems.DECODED,
            deep_gemm_problems.paged_logits("fp8"),
        ),
        Operation(
            "mxfp4_mqa_logits", v4_problems.is_v4, deep_gemm_problems.PREFILLED, deep_gemm_problems.row_logits("mxfp4")
        ),
        Operation(
            "mxfp4_paged_mqa_logits",
            v4_problems.is_v4,
            deep_gemm_problems.DECODED,
            deep_gemm_problems.paged_logits("mxfp4"),
        ),
        Operation(
            "fp8_gemm_nt",
            deep_gemm_problems.projects_fp8,
            deep_gemm_problems.PROJECTIONS,
            deep_gemm_problems.projection,
        ),
        Operation("prenorm_product", lambda g: g.streams > 0, deep_gemm_problems.ROWS, deep_gemm_problems.prenorm),
        Operation("merge_states", _has_latent, each("tokens", 64, 512, 4096), _merge),
    )
}
"""By name, those first in which a model that generates text spends most of its time: ``tune`` takes them in order."""


@dataclass(frozen=True)
class Derived:
    """A problem that a model's op launches."""

    problem: Problem
    operation: Operation
    geometry: Geometry
    size: dict[str, int]

    def call(self, device: torch.device | str, dtype: torch.dtype) -> Call:
        return self.operation.build(self.geometry, self.size, Make(device, dtype))


def of_model(
    geometry: Geometry, chip: Chip, dtype: torch.dtype = torch.bfloat16, operations: Iterable[str] = OPERATIONS
) -> tuple[list[Derived], dict[str, str]]:
    """The problems of one device's share of a model on ``chip``, each once; and op -> reason for those ops that have no
    path there."""
    found: dict[tuple, Derived] = {}
    refused: dict[str, str] = {}
    for operation in (OPERATIONS[name] for name in operations):
        if not operation.applies(geometry):
            continue
        for size in operation.sizes:
            try:
                with on_cpu("torch", chip.device), record() as recording, torch.no_grad():
                    operation.build(geometry, size, Make("meta", dtype)).run()
            except (NotImplementedError, ValueError) as error:  # no path on this chip; a share too narrow for a format
                refused[operation.name] = str(error)
                continue
            for problem in recording:
                found.setdefault(problem.key, Derived(problem, operation, geometry, size))
    return list(found.values()), refused


def names_of(dtype: str) -> torch.dtype:
    """torch's dtype for "bf16", "fp16" or "fp32"."""
    return next(torch_dtype for torch_dtype, name in DTYPE_NAMES.items() if name == dtype)
