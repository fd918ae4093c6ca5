"""What engines call under DeepGEMM's names, at the sizes of models' layers; :mod:`mla_kernels.autotune.problems`."""

import torch

from mla_kernels.attention.indexer.mqa import mqa_logits, paged_mqa_logits
from mla_kernels.autotune.making import PAGE, Call, Make, each
from mla_kernels.autotune.models import Geometry
from mla_kernels.hyper.prenorm import prenorm_product
from mla_kernels.latent.indexer.cache import SCALE_BYTES
from mla_kernels.moe.quantised.scaled_product import scaled_product

BLOCK = 128  # rows and columns of weights that share a scale
V4_INDEX_HEADS, INDEX_WIDTH = 64, 128
PREFILLED = each("keys", 4096, 32768, tokens=4096)
DECODED = each("batch", 1, 8, 64, keys=8192)
ROWS = each("tokens", 1, 8, 64, 512, 4096)
PROJECTIONS = (
    *each("tokens", 1, 64, 4096, projection=0), *each("tokens", 1, 64, 4096, projection=1),
    *each("tokens", 1, 64, 4096, projection=2), *each("tokens", 1, 64, 4096, projection=3),
)  # fmt: skip
_FP8 = torch.float8_e4m3fn


def index_heads(g: Geometry) -> int:
    return g.index_heads or (V4_INDEX_HEADS if g.scoring == "sqrt_softplus" and not g.latent else 0)


def projects_fp8(g: Geometry) -> bool:
    return g.latent > 0 and g.q_rank > 0 and "fp8_block" in g.formats


def _queries(g: Geometry, make: Make, form: str, *rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = make.normal(*rows, index_heads(g), INDEX_WIDTH, dtype=torch.bfloat16)
    return q.to(_FP8) if form == "fp8" else q, make.normal(*rows, index_heads(g), dtype=torch.float32)


def _codes(*shape: int, make: Make) -> torch.Tensor:
    return make.integers(*shape, below=0x7F).to(torch.uint8)


def row_logits(form: str):
    """Prefill: keys in rows."""

    def build(g: Geometry, size, make: Make) -> Call:
        tokens, keys = size["tokens"], size["keys"]
        q, weights = _queries(g, make, form, tokens)
        k = _codes(keys, INDEX_WIDTH // (2 if form == "mxfp4" else 1), make=make)
        k, scale = (
            (k.view(_FP8), make.normal(keys, dtype=torch.float32).abs())
            if form == "fp8"
            else (k, make.full(keys, value=0x7F7F7F7F))
        )
        starts, ends = make.full(tokens, value=0), make.full(tokens, value=keys)
        out = make.normal(tokens, keys, dtype=torch.float32)

        def run():
            mqa_logits(q, k, scale, form, weights, starts, ends, out, False, False)
            return (out,)

        return Call(run, None)

    return build


def paged_logits(form: str):
    """Decode: keys in pages."""

    def build(g: Geometry, size, make: Make) -> Call:
        batch, pages = size["batch"], size["keys"] // PAGE
        q, weights = _queries(g, make, form, batch, 1)
        key_bytes = INDEX_WIDTH // (2 if form == "mxfp4" else 1) + SCALE_BYTES
        cache, table = _codes(batch * pages, PAGE * key_bytes, make=make), make.counting(batch, pages)
        limits = make.full(batch, 1, value=size["keys"])
        out = make.normal(batch, size["keys"], dtype=torch.float32)

        def run():
            paged_mqa_logits(q, cache, form, weights.flatten(0, 1), table, limits, out, False)
            return (out,)

        return Call(run, None)

    return build


def projection(g: Geometry, size, make: Make) -> Call:
    """One of MLA's linear layers, or of the shared experts, in e4m3 with scales of blocks: [tokens, K] @ [N, K].T."""
    tokens = size["tokens"]
    columns, depth = (
        (g.q_rank + g.latent + g.rope, g.hidden),
        (g.heads * (g.nope + g.rope), g.q_rank),
        (g.hidden, g.heads * g.value),
        (2 * g.inner, g.hidden),
    )[size["projection"]]
    blocks = -(-depth // BLOCK)
    a, b = (make.normal(1, rows, depth, dtype=torch.bfloat16).to(_FP8) for rows in (tokens, columns))
    a_scale = make.normal(1, tokens, blocks, dtype=torch.float32).abs()
    b_scale = make.normal(1, -(-columns // BLOCK), blocks, dtype=torch.float32).abs()
    d = make.normal(1, tokens, columns, dtype=torch.bfloat16)

    def run():
        scaled_product(a, a_scale, b, b_scale, d, None, "batched", [BLOCK] * 3, 0, False)
        return (d[0],)

    return Call(run, None)


def prenorm(g: Geometry, size, make: Make) -> Call:
    """Products of hyper-connections' streams, and their sums of squares."""
    depth = g.streams * g.hidden
    x, fn = make.normal(size["tokens"], depth), make.normal((2 + g.streams) * g.streams, depth, dtype=torch.float32)

    def expected():
        few = x[:4].float()
        return few @ fn.t(), few.square().sum(1)

    return Call(lambda: prenorm_product(x, fn), expected)
