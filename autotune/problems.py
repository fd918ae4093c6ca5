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
from mla_kernels.autotune.models import Geometry
from mla_kernels.launch import DTYPE_NAMES, on_cpu
from mla_kernels.moe.quantised.formats import FORMATS, WeightFormat
from mla_kernels.reference import attention, hyper, moe, prefill, prolog, quant, route, sparse
from mla_kernels.targets.chips import Chip
from mla_kernels.tiles import Problem, record

PAGE, CONTEXT = 64, 4096
CHECKED = 4  # tokens or sequences of a result that are held against the reference
_ROPE = "interleaved_to_half"
_V4_WIDTH = 512  # of DeepSeek-V4's rows, raw and compressed


@dataclass(frozen=True)
class Call:
    """One op with its arguments. ``expected`` is the reference's result in float32 for the first rows of the op's."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    expected: Callable[[], tuple[torch.Tensor, ...]] | None


@dataclass(frozen=True)
class Operation:
    """A public op as models call it."""

    name: str
    applies: Callable[[Geometry], bool]
    sizes: tuple[dict[str, int], ...]
    build: Callable[[Geometry, dict[str, int], "Make"], Call]


class Make:
    """Arguments on one device in one dtype: random numbers, or on ``meta`` shapes alone."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self.bare = self.device.type == "meta"

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return made if self.bare else made.normal_(0.0, scale)

    def integers(self, *shape: int, below: int) -> torch.Tensor:
        if self.bare:
            return torch.empty(shape, dtype=torch.int32, device=self.device)
        return torch.randint(below, shape, dtype=torch.int32, device=self.device)

    def choices(self, rows: int, count: int, below: int) -> torch.Tensor:
        """[rows, count] of different numbers below ``below``."""
        if self.bare:
            return self.integers(rows, count, below=below)
        chunks = torch.arange(rows, device=self.device).split(4096)
        found = [torch.rand(len(c), below, device=self.device).topk(count).indices for c in chunks]
        return torch.cat(found).int()

    def counting(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(count, dtype=torch.int32, device=self.device).view(shape)

    def full(self, *shape: int, value: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=self.device)

    def angles(self, rope: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.normal(CONTEXT, rope // 2, dtype=torch.float32)
        return table.cos(), table.sin()


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


def _paged(g: Geometry, size, make: Make, layout: str | None = None):
    pages = CONTEXT // PAGE
    cache = mk.LatentCache.allocate(
        size["batch"] * pages, PAGE, latent_dim=g.latent or 512, rope_dim=g.rope, dtype=make.dtype, layout=layout,
        device=make.device,
    )  # fmt: skip
    if layout is None and not make.bare:
        cache.data.normal_()
    table = make.counting(size["batch"], pages)
    return cache, table, make.full(size["batch"], value=CONTEXT)


def _decode(g: Geometry, size, make: Make) -> Call:
    cache, table, lengths = _paged(g, size, make)
    q = make.normal(size["batch"], size["queries"], g.heads, cache.width)
    scale = (g.nope + g.rope) ** -0.5

    def expected():
        rows = slice(2)
        wide = cache.data.float(), table[rows], lengths[rows]
        return attention.mla_decode(q[rows].float(), *wide, softmax_scale=scale, latent_dim=g.latent)

    return Call(lambda: mk.mla_decode(q, cache, table, lengths, softmax_scale=scale), expected)


def _prefill(g: Geometry, size, make: Make) -> Call:
    tokens = size["tokens"]
    q = make.normal(tokens, g.heads, g.nope + g.rope)
    k, v = make.normal(tokens, g.heads, g.nope), make.normal(tokens, g.heads, g.value)
    k_rope = make.normal(tokens, g.rope) if g.rope else None
    ends = make.counting(2) * tokens
    options = dict(softmax_scale=(g.nope + g.rope) ** -0.5, causal=bool(size["causal"]))

    def expected():
        few = min(256, tokens) if size["causal"] else tokens  # the first queries see the first keys alone
        cut = make.counting(2) * few
        rotated = None if k_rope is None else k_rope[:few].float()
        parts = q[:few].float(), k[:few].float(), v[:few].float(), cut, cut
        return prefill.mla_prefill(*parts, max_seqlen_q=few, max_seqlen_k=few, k_rope=rotated, **options)

    return Call(
        lambda: mk.mla_prefill(q, k, v, ends, ends, max_seqlen_q=tokens, max_seqlen_k=tokens, k_rope=k_rope, **options),
        expected,
    )


def _hyper(g: Geometry, size, make: Make) -> Call:
    tokens, streams = size["tokens"], g.streams
    fp32 = {"dtype": torch.float32}
    rows, depth = (2 + streams) * streams, streams * g.hidden
    written = (
        make.normal(tokens, streams, g.hidden), make.normal(tokens, g.hidden), make.normal(tokens, streams, **fp32),
        make.normal(tokens, streams, streams, scale=0.5, **fp32),
    )  # fmt: skip
    fn = make.normal(rows, depth, scale=depth**-0.5, **fp32)
    weights = fn, make.normal(rows, **fp32), make.normal(3, **fp32)
    norm = make.normal(g.hidden, **fp32)

    def expected():
        few = (x[:CHECKED].float() for x in written)
        return hyper.hyper_post_pre(*few, *weights, norm_weight=norm)

    return Call(lambda: mk.hyper_post_pre(*written, *weights, norm_weight=norm), expected)


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


def _write(g: Geometry, size, make: Make) -> Call:
    cache = mk.LatentCache.allocate(
        max(1, -(-size["tokens"] // PAGE)), PAGE, latent_dim=g.latent, rope_dim=g.rope, dtype=make.dtype,
        device=make.device,
    )  # fmt: skip
    rows, norm = make.normal(size["tokens"], cache.width), make.normal(g.latent)
    where = make.integers(size["tokens"], below=CONTEXT), make.counting(size["tokens"])
    tables = make.angles(g.rope)

    def run():
        mk.write_latent(rows, norm, *tables, *where, cache, rope=_ROPE)
        return (cache.data,)

    return Call(run, None)


def _prolog(g: Geometry, size, make: Make) -> Call:
    tokens = size["tokens"]
    cache = mk.LatentCache.allocate(
        max(1, -(-tokens // PAGE)), PAGE, latent_dim=g.latent, rope_dim=g.rope, dtype=make.dtype, device=make.device
    )
    where = make.integers(tokens, below=CONTEXT), make.counting(tokens)
    tables = make.angles(g.rope)
    q_a, q_norm = (make.normal(tokens, g.q_rank), make.normal(g.q_rank)) if g.q_rank else (None, None)
    kv_a, kv_norm = make.normal(tokens, cache.width), make.normal(g.latent)

    def run():
        if q_a is None:
            weight, hidden = make.normal(cache.width, g.hidden), make.normal(tokens, g.hidden)
            mk.compress_latent(hidden, weight, kv_norm, *tables, *where, cache, rope=_ROPE)
            return (cache.data,)
        return (mk.norm_and_write(q_a, q_norm, kv_a, kv_norm, *tables, *where, cache, rope=_ROPE), cache.data)

    return Call(run, None)


def _indexer_write(g: Geometry, size, make: Make) -> Call:
    tokens = size["tokens"]
    cache = mk.IndexerCache.allocate(
        max(1, -(-tokens // PAGE)), PAGE, head_dim=g.index_width, layout="fp8", device=make.device
    )
    key, queries = make.normal(tokens, g.index_width), make.normal(tokens, g.index_heads, g.index_width)
    norm = make.normal(g.index_width, dtype=torch.float32), make.normal(g.index_width, dtype=torch.float32)
    positions, slots = make.integers(tokens, below=CONTEXT), make.counting(tokens)
    tables = make.angles(g.rope)

    def run():
        mk.write_indexer_key(key, *norm, *tables, positions, slots, cache, rope_dim=g.rope, rope="half")
        return (mk.rotate_indexer_query(queries, *tables, positions, rope_dim=g.rope, rope="half"),)

    return Call(run, None)


def _heads(g: Geometry, size, make: Make) -> Call:
    """DeepSeek-V4's queries, and its attention's output rotated back."""
    x, positions = make.normal(size["tokens"], g.heads, 512), make.integers(size["tokens"], below=CONTEXT)
    tables = make.angles(64)

    def run():
        mk.rotate_heads(x, *tables, positions, rope_dim=64, inverse=True)
        return (mk.rotate_heads(x, *tables, positions, rope_dim=64, norm_eps=1e-6),)

    return Call(run, None)


def _select(g: Geometry, size, make: Make) -> Call:
    batch, pages = size["batch"], size["keys"] // PAGE
    cache = mk.IndexerCache.allocate(batch * pages, PAGE, head_dim=g.index_width, layout="fp8", device=make.device)
    q = make.normal(batch, 1, g.index_heads, g.index_width)
    weights = make.normal(batch, 1, g.index_heads, dtype=torch.float32)
    table, lengths = make.counting(batch, pages), make.full(batch, value=size["keys"])
    return Call(lambda: (mk.select_slots(q, cache, weights, table, lengths, g.index_top_k),), None)


def _is_v4(g: Geometry) -> bool:
    return not g.latent and g.scoring == "sqrt_softplus"


def _write_kv(g: Geometry, size, make: Make) -> Call:
    cache = mk.LatentCache.allocate(
        max(1, -(-size["tokens"] // PAGE)), PAGE, latent_dim=_V4_WIDTH, rope_dim=0, dtype=make.dtype, device=make.device
    )
    rows, norm = make.normal(size["tokens"], _V4_WIDTH), make.normal(_V4_WIDTH, dtype=torch.float32)
    where, tables = (make.integers(size["tokens"], below=CONTEXT), make.counting(size["tokens"])), make.angles(64)

    def run():
        mk.write_kv(rows, norm, *tables, *where, cache)
        return (cache.data,)

    return Call(run, None)


def _compressor(ratio: int, width: int, tokens: int, make: Make):
    """Arguments and options of a compressor of DeepSeek-V4: 128 tokens an entry, or 4 with overlap."""
    row = width * (1 + (ratio == 4))
    bias, norm = make.normal(ratio, row, dtype=torch.float32), make.normal(width, dtype=torch.float32)
    inputs = make.normal(tokens, row), make.normal(tokens, row), bias, norm, *make.angles(64)
    return inputs, {"ratio": ratio, "overlap": ratio == 4}


def _write_windows(g: Geometry, size, make: Make) -> Call:
    """Sequences that complete a window: at 128, at 4 and (width 128) the indexer's."""
    sequences, tokens, width = size["sequences"], size["tokens"], size["width"]
    inputs, options = _compressor(size["ratio"], width, sequences * tokens, make)
    if width == _V4_WIDTH:
        cache = mk.LatentCache.allocate(
            sequences, PAGE, latent_dim=width, rope_dim=0, dtype=make.dtype, device=make.device
        )
    else:
        cache = mk.IndexerCache.allocate(sequences, PAGE, head_dim=width, layout="fp8", device=make.device)
    rows = size["ratio"] * (1 + options["overlap"]) + 3
    state = make.normal(sequences, rows, 2, inputs[0].shape[1])
    length = size["ratio"] * max(2, -(-tokens // size["ratio"]))
    bounds, table = make.counting(sequences + 1) * tokens, make.counting(sequences, max(1, length // PAGE))
    places = make.counting(sequences), bounds, make.full(sequences, value=length), table

    def run():
        mk.write_windows(*inputs, state, *places, cache, max_tokens=tokens, **options)
        return (cache.data,)

    return Call(run, None)


def _compress_windows(g: Geometry, size, make: Make) -> Call:
    inputs, options = _compressor(size["ratio"], size["width"], size["tokens"], make)
    inputs = [one.requires_grad_() for one in inputs[:4]] + list(inputs[4:])
    ends = make.counting(2) * size["tokens"]

    def run():
        with torch.enable_grad():
            entries, _ = mk.compress_windows(*inputs, ends, **options)
        return (entries, *torch.autograd.grad(entries, inputs[:4], torch.ones_like(entries)))

    return Call(run, None)


def _picks(g: Geometry) -> int:
    """Rows that a token of sparse attention picks; in DeepSeek-V4 512 entries beside a window of 128."""
    return g.index_top_k if g.latent else 512 + 128


def _sparse(g: Geometry, size, make: Make) -> Call:
    cache, _, _ = _paged(g, size, make)
    q = make.normal(size["batch"], 1, g.heads, cache.width)
    picks = make.choices(size["batch"], _picks(g), cache.num_slots)[:, None]
    sink = None if g.latent else make.normal(g.heads, dtype=torch.float32)
    options = dict(softmax_scale=(g.nope + g.rope) ** -0.5, sink=sink)

    def expected():
        few = q[:2].float(), cache.data.float(), picks[:2]
        return sparse.sparse_mla_decode(*few, latent_dim=cache.latent_dim, **options)

    return Call(lambda: mk.sparse_mla_decode(q, cache, picks, **options), expected)


def _sparse_prefill(g: Geometry, size, make: Make) -> Call:
    tokens, width = size["tokens"], (g.latent or 512) + g.rope
    q, rows = make.normal(tokens, g.heads, width), make.normal(tokens, width)
    picks = make.choices(tokens, min(_picks(g), tokens), tokens)
    options = dict(softmax_scale=(g.nope + g.rope) ** -0.5, latent_dim=g.latent or 512)
    return Call(
        lambda: mk.sparse_mla_prefill(q, rows, picks, **options),
        lambda: sparse.sparse_mla_prefill(q[:CHECKED].float(), rows.float(), picks[:CHECKED], **options),
    )


def _each(name: str, *values: int, **more: int) -> tuple[dict[str, int], ...]:
    return tuple({name: value} | more for value in values)


def _has_latent(g: Geometry) -> bool:
    return g.latent > 0


def _is_sparse(g: Geometry) -> bool:
    return g.index_heads > 0 or g.latent == 0


QUANTISED = tuple(format.value for format in WeightFormat if format is not WeightFormat.PLAIN)

_TOKENS = _each("tokens", 1, 8, 64, 512, 4096)
_WINDOWS = (
    *_each("sequences", 1, 8, 64, ratio=128, width=512, tokens=1),
    *_each("sequences", 1, 8, 64, ratio=4, width=512, tokens=1),
    *_each("sequences", 1, 8, 64, ratio=4, width=128, tokens=1),
    *_each("ratio", 128, 4, width=512, tokens=4096, sequences=1),
)
_COMPRESSED = (*_each("ratio", 128, 4, width=512, tokens=8192), *_each("ratio", 4, width=128, tokens=8192))

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "mla_decode",
            _has_latent,
            (*_each("batch", 1, 8, 64, queries=1), *_each("queries", 2, 4, batch=8)),
            _decode,
        ),
        Operation("sparse_mla_decode", _is_sparse, _each("batch", 1, 8, 64), _sparse),
        *(
            Operation(
                f"fused_experts {format}",
                lambda g, format=format: g.experts > 0 and format in g.formats,
                _each("tokens", *(4**i for i in range(8))),
                _quantised(format),
            )
            for format in QUANTISED
        ),
        Operation("fused_moe", lambda g: g.experts > 0, _each("tokens", *(4**i for i in range(8))), _experts),
        Operation("mla_prefill", _has_latent, _each("causal", 1, 0, tokens=4096), _prefill),
        Operation("sparse_mla_prefill", _is_sparse, _each("tokens", 4096), _sparse_prefill),
        Operation("select_slots", lambda g: g.index_heads > 0, _each("batch", 1, 8, 64, keys=8192), _select),
        Operation("absorb_query", _has_latent, _each("tokens", 1, 8, 64, 512), _absorb),
        Operation("expand_output", _has_latent, _each("tokens", 1, 8, 64, 512), _expand),
        Operation("norm_and_write", _has_latent, _TOKENS, _prolog),
        Operation("write_latent", _has_latent, _TOKENS, _write),
        Operation("write_indexer_key", lambda g: g.index_heads > 0, _TOKENS, _indexer_write),
        Operation("rotate_heads", lambda g: g.latent == 0, _TOKENS, _heads),
        Operation("write_kv", _is_v4, _TOKENS, _write_kv),
        Operation("write_windows", _is_v4, _WINDOWS, _write_windows),
        Operation("compress_windows", _is_v4, _COMPRESSED, _compress_windows),
        Operation("route", lambda g: g.experts > 0, _TOKENS, _route),
        Operation("hyper_post_pre", lambda g: g.streams > 0, _TOKENS, _hyper),
        Operation("merge_states", _has_latent, _each("tokens", 64, 512, 4096), _merge),
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
