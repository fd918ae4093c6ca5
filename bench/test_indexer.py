"""The lightning indexer at DeepSeek-V3.2's sizes: logits, the choice of keys, and both, against plain torch."""

import pytest
import torch

from mla_kernels import indexer_logits, indexer_topk, quantise_indexer_query, select_keys

HEADS, HEAD_DIM, TOP_K = 64, 128, 2048


def plain_logits(q, k, weights, starts, ends):
    dots = torch.relu(torch.einsum("thd,sd->ths", q.float(), k.float()))
    key = torch.arange(k.shape[0])
    unseen = (key < starts[:, None]) | (key >= ends[:, None])
    return torch.einsum("th,ths->ts", weights, dots).masked_fill(unseen, float("-inf"))


def problem(tokens, keys):
    q, k = torch.randn(tokens, HEADS, HEAD_DIM).bfloat16(), torch.randn(keys, HEAD_DIM).bfloat16()
    ends = torch.arange(keys - tokens + 1, keys + 1, dtype=torch.int32)
    return q, k, torch.randn(tokens, HEADS), torch.zeros_like(ends), ends


SIZES = pytest.mark.parametrize("tokens, keys", [(1, 32768), (128, 4096)], ids=["1x32k", "128x4k"])


@SIZES
@pytest.mark.parametrize("form", ["bf16", "fp8", "codes"])
def test_logits(race, tokens, keys, form):
    """bf16; keys in fp8; queries, too."""
    q, k, weights, starts, ends = problem(tokens, keys)
    scale, stored, asked = None, k, q
    if form != "bf16":
        stored, scale = k.to(torch.float8_e4m3fn), torch.ones(keys)
        k = stored.to(torch.bfloat16)
    if form == "codes":
        asked = q.to(torch.float8_e4m3fn)
        q = asked.to(torch.bfloat16)
    seen = torch.arange(keys) < ends[:, None]
    exact = plain_logits(q, k, weights, starts, ends).double()
    race(
        lambda: indexer_logits(asked, stored, weights, starts, ends, k_scale=scale),
        {"torch": lambda: plain_logits(q, k, weights, starts, ends)},
        exact[seen],
        pick=lambda logits: logits[seen],
        nbytes=asked.nbytes + stored.nbytes + 4 * tokens * keys,
        flops=2 * tokens * keys * HEADS * (HEAD_DIM + 1),
    )


@pytest.mark.parametrize("tokens", [1, 256])
def test_quantised_queries(race, tokens):
    """The values that the codes stand for."""
    q, weights = torch.randn(tokens, HEADS, HEAD_DIM).bfloat16(), torch.rand(tokens, HEADS) + 1

    def plain():
        values = q.float()
        scale = torch.exp2(torch.ceil(torch.log2((values.abs().amax(-1) / 448).clamp_min(1e-4))))
        return (values / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), weights * scale

    def values(result):
        codes, folded = result
        return codes.float() * (folded / weights)[..., None]

    race(
        lambda: quantise_indexer_query(q, weights),
        {"torch": plain},
        values(plain()).double(),
        pick=values,
        nbytes=q.nbytes + q.numel() + 8 * weights.numel(),
        flops=0,
    )


@pytest.mark.parametrize("rows, keys", [(1, 1 << 17), (1, 1 << 20), (64, 1 << 15)], ids=["128k", "1M", "64x32k"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_topk(race, rows, keys, ties):
    """torch.topk promises no order among equal values, so only the chosen values are compared."""
    logits = torch.randn(rows, keys)
    logits = logits.round() if ties else logits
    race(
        lambda: logits.gather(1, indexer_topk(logits, TOP_K).long()).sort(1).values,
        {"torch.topk": lambda: logits.gather(1, logits.topk(TOP_K).indices.sort(1).values).sort(1).values},
        logits.double().topk(TOP_K).values.sort(1).values,
        nbytes=logits.nbytes + 4 * rows * TOP_K,
        flops=0,
    )


@SIZES
def test_select(race, tokens, keys):
    args = problem(tokens, keys)
    logits = plain_logits(*args)
    race(
        lambda: logits.gather(1, select_keys(*args, TOP_K).clamp_min(0).long()).sort(1).values,
        {"torch": lambda: logits.gather(1, plain_logits(*args).topk(TOP_K).indices).sort(1).values},
        logits.double().topk(TOP_K).values.sort(1).values,
        nbytes=args[0].nbytes + args[1].nbytes + 4 * tokens * TOP_K,
        flops=2 * tokens * keys * HEADS * (HEAD_DIM + 1),
    )
