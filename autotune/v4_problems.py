"""DeepSeek-V4's ops at the sizes of its layers: see :mod:`mla_kernels.autotune.problems`."""

import torch

import mla_kernels as mk
from mla_kernels.autotune.making import CHECKED, CONTEXT, PAGE, Call, Make, each
from mla_kernels.autotune.models import Geometry
from mla_kernels.reference import hyper

WIDTH = 512  # of rows, raw and compressed

WINDOWS = (
    *each("sequences", 1, 8, 64, ratio=128, width=512, tokens=1),
    *each("sequences", 1, 8, 64, ratio=4, width=512, tokens=1),
    *each("sequences", 1, 8, 64, ratio=4, width=128, tokens=1),
    *each("ratio", 128, 4, width=512, tokens=4096, sequences=1),
)
PAGED_WINDOWS = (
    *each("tokens", 1, 64, 4096, ratio=128, width=512),
    *each("tokens", 1, 64, 4096, ratio=4, width=512),
    *each("tokens", 1, 64, 4096, ratio=4, width=128),
)
COMPRESSED = (*each("ratio", 128, 4, width=512, tokens=8192), *each("ratio", 4, width=128, tokens=8192))


def is_v4(g: Geometry) -> bool:
    return not g.latent and g.scoring == "sqrt_softplus"


def write_kv(g: Geometry, size, make: Make, layout: str | None = None) -> Call:
    cache = mk.LatentCache.allocate(
        max(1, -(-size["tokens"] // PAGE)), PAGE, latent_dim=WIDTH, rope_dim=0, dtype=make.dtype, layout=layout,
        device=make.device,
    )  # fmt: skip
    rows, norm = make.normal(size["tokens"], WIDTH), make.normal(WIDTH, dtype=torch.float32)
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


def write_windows(g: Geometry, size, make: Make) -> Call:
    """Sequences that complete a window: at 128, at 4 and (width 128) the indexer's."""
    sequences, tokens, width = size["sequences"], size["tokens"], size["width"]
    inputs, options = _compressor(size["ratio"], width, sequences * tokens, make)
    if width == WIDTH:
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


def write_paged_windows(g: Geometry, size, make: Make, layout: str | None = None) -> Call:
    """vLLM's pages of states: of 8 tokens, with overlap of 4; the tokens are the newest of one sequence."""
    tokens, ratio, width = size["tokens"], size["ratio"], size["width"]
    page_size, overlap = (4, True) if ratio == 4 else (8, False)
    if width == WIDTH:
        options = {"latent_dim": width, "rope_dim": 0, "dtype": make.dtype, "layout": layout, "device": make.device}
        cache = mk.LatentCache.allocate(-(-tokens // (ratio * PAGE)), PAGE, **options)
    else:
        pages = -(-tokens // (ratio * PAGE))
        cache = mk.IndexerCache.allocate(pages, PAGE, head_dim=width, layout="fp8", device=make.device)
    count = max(ratio, tokens) // page_size + 1
    states = make.normal(count, page_size, 2, width * (1 + overlap), dtype=torch.float32)
    positions = make.counting(tokens) + max(0, ratio - tokens)
    slots = torch.where((positions + 1) % ratio == 0, positions // ratio, -1)
    places = positions, slots, make.full(tokens, value=0), make.counting(1, count).int()
    weights = make.normal(width), *make.angles(64)

    def run():
        mk.write_paged_windows(states, *places, *weights, cache, ratio=ratio, overlap=overlap)
        return (cache.data,)

    return Call(run, None)


def compress_windows(g: Geometry, size, make: Make) -> Call:
    inputs, options = _compressor(size["ratio"], size["width"], size["tokens"], make)
    inputs = [one.requires_grad_() for one in inputs[:4]] + list(inputs[4:])
    ends = make.counting(2) * size["tokens"]

    def run():
        with torch.enable_grad():
            entries, _ = mk.compress_windows(*inputs, ends, **options)
        return (entries, *torch.autograd.grad(entries, inputs[:4], torch.ones_like(entries)))

    return Call(run, None)


def entry_slots(g: Geometry, size, make: Make) -> Call:
    """All entries of 128 tokens, which every query sees."""
    sequences, entries = size["sequences"], 8192 // 128
    table, lengths = make.counting(sequences, 1), make.full(sequences, value=8192)
    options = {"queries": 1, "ratio": 128, "page_size": PAGE, "max_entries": entries}
    return Call(lambda: (mk.entry_slots(table, lengths, **options),), None)


def rotated_heads(g: Geometry, size, make: Make) -> Call:
    """DeepSeek-V4's queries, and its attention's output rotated back."""
    x, positions = make.normal(size["tokens"], g.heads, 512), make.integers(size["tokens"], below=CONTEXT)
    tables = make.angles(64)

    def run():
        mk.rotate_heads(x, *tables, positions, rope_dim=64, inverse=True)
        return (mk.rotate_heads(x, *tables, positions, rope_dim=64, norm_eps=1e-6),)

    return Call(run, None)


def _hyper(g: Geometry, tokens: int, make: Make):
    """Streams, a layer's result, post and comb; fn, base and scale; and the weight of the next layer's norm."""
    streams, fp32 = g.streams, {"dtype": torch.float32}
    rows, depth = (2 + streams) * streams, streams * g.hidden
    written = (
        make.normal(tokens, streams, g.hidden), make.normal(tokens, g.hidden), make.normal(tokens, streams, **fp32),
        make.normal(tokens, streams, streams, scale=0.5, **fp32),
    )  # fmt: skip
    fn = make.normal(rows, depth, scale=depth**-0.5, **fp32)
    return written, (fn, make.normal(rows, **fp32), make.normal(3, **fp32)), make.normal(g.hidden, **fp32)


def hyper_step(g: Geometry, size, make: Make) -> Call:
    written, weights, norm = _hyper(g, size["tokens"], make)

    def expected():
        few = (x[:CHECKED].float() for x in written)
        return hyper.hyper_post_pre(*few, *weights, norm_weight=norm)

    return Call(lambda: mk.hyper_post_pre(*written, *weights, norm_weight=norm), expected)


def hyper_backward(g: Geometry, size, make: Make) -> Call:
    """A step and its gradients; those of the tokens' own tensors are checked, the weights' are sums over all."""
    written, weights, norm = _hyper(g, size["tokens"], make)

    def gradients(function, tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        with torch.enable_grad():
            results = function(*tensors, *(x.detach().requires_grad_() for x in weights), norm_weight=norm)
        return torch.autograd.grad(results, tensors, [torch.ones_like(x) for x in results])

    return Call(
        lambda: gradients(mk.hyper_post_pre, written),
        lambda: gradients(hyper.hyper_post_pre, [x[:CHECKED].float() for x in written]),
    )
