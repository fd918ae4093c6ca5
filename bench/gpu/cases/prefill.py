"""Causal attention of a prompt over expanded keys, 192 / 128 wide: forward, and forward with gradients."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

NOPE, ROPE, VALUE = 128, 64, 128
GLM_5 = 192, 64, 256
LOOKED_AT_HEADS = 2


def with_rope(k: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Keys of every head, [tokens, heads, 192], from [tokens, heads, 128] and the one rope part [tokens, 64]."""
    return torch.cat([k, rope[:, None].expand(-1, k.shape[1], -1)], -1)


def exact_rows(q, key, v, rows: list[int]) -> torch.Tensor:
    scores = torch.einsum("thd,khd->htk", q[rows].float(), key.float()) * scale(q)
    seen = torch.arange(len(key), device=q.device) <= torch.tensor(rows, device=q.device)[:, None]
    return torch.einsum("htk,khd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v.float())


def scale(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5


def sdpa(backend: SDPBackend, padded: bool, q, key, v):
    """torch's attention by ``backend``, with values ``padded`` to the width of keys."""
    value = v.shape[-1]
    v = pad(v, (0, key.shape[-1] - value)) if padded else v
    heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (q, key, v)]
    with sdpa_kernel([backend]):
        out = scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale(q))
    return out[0].transpose(0, 1)[..., :value]


def torchs(place: Place) -> dict[str, tuple[SDPBackend, bool]]:
    """torch's kernels: name -> backend, whether values are padded. Its default on a CPU."""
    if not place.gpu:
        return {"torch": (SDPBackend.MATH, False)}
    if torch.version.hip:
        return {"torch, flash, values padded": (SDPBackend.FLASH_ATTENTION, True)}
    return {
        "cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
        "FlashAttention-2, values padded": (SDPBackend.FLASH_ATTENTION, True),
    }


def tensors(heads: int, tokens: int, widths: tuple[int, int, int], place: Place):
    """q, k, v, rope and our call's function of them, with more keywords."""
    nope, rotated, value = widths
    q, kv = place.normal(tokens, heads, nope + rotated), place.normal(tokens, heads, nope + value)
    rope = place.normal(tokens, rotated)
    k, v = kv.split([nope, value], -1)
    bounds = place.ints(torch.tensor([0, tokens]))

    def ours(q, k, v, rope, **more):
        sizes = dict(max_seqlen_q=tokens, max_seqlen_k=tokens, softmax_scale=scale(q))
        return mk.mla_prefill(q, k, v, bounds, bounds, k_rope=rope, **sizes, **more)[0]

    flops = 2 * heads * (tokens * (tokens + 1) / 2) * (nope + rotated + value)
    nbytes = 2 * tokens * (heads * (nope + rotated + nope + 2 * value) + rotated)
    return q, k, v, rope, bounds, ours, flops, nbytes


def forward(heads: int, tokens: int, widths: tuple[int, int, int], place: Place, peers) -> Problem:
    tokens, heads = place.size(tokens, 96), place.size(heads, 4)
    q, k, v, rope, bounds, ours, flops, nbytes = tensors(heads, tokens, widths, place)
    key = with_rope(k, rope)
    rows = sorted({0, 1, tokens // 3, tokens - 2, tokens - 1})

    def call(**more):
        return lambda copy: ours(q, k, v, rope, **more)

    problem = Problem(call(), lambda: exact_rows(q, key, v, rows), lambda out: out[rows], bytes=nbytes, flops=flops)
    variants(problem, mk.mla_prefill, call, place)
    for name, how in torchs(place).items():
        problem.add(name, lambda copy, how=how: sdpa(*how, q, key, v))
    if peers.fa3:
        attend = partial(peers.fa3.attend, softmax_scale=scale(q))
        lengths = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=tokens, max_seqlen_k=tokens)
        problem.add("FlashAttention-3", lambda copy: attend(q[None], key[None], v[None])[0])
        problem.add("FlashAttention-3, variable lengths", lambda copy: attend(q, key, v, **lengths))
        problem.add(
            "FlashAttention-3 with concatenation", lambda copy: attend(q[None], with_rope(k, rope)[None], v[None])[0]
        )
    return problem


def backward(heads: int, tokens: int, widths: tuple[int, int, int], place: Place, peers) -> Problem:
    tokens, heads = place.size(tokens, 96), place.size(heads, 4)
    q, k, v, rope, _, ours, flops, nbytes = tensors(heads, tokens, widths, place)
    k, v, toward = k.contiguous(), v.contiguous(), place.normal(tokens, heads, widths[2])
    looked_at = range(min(heads, LOOKED_AT_HEADS))
    some = slice(len(looked_at))

    def step(function, *leaves, toward=toward):
        def run(copy: int):
            with torch.enable_grad():
                fresh = [leaf.detach().requires_grad_() for leaf in leaves]
                return torch.autograd.grad(function(*fresh), fresh, toward)

        return run

    def plain(q, k, v, rope):
        scores = torch.einsum("thd,khd->htk", q, with_rope(k, rope)) * scale(q)
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        return torch.einsum("htk,khd->thd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v)

    def together(gradients, rope_gradient):
        """Of queries, keys and values, and, as large as these, of the rotated key, which is a sum over all heads."""
        shared = (rope_gradient.float() / heads**0.5)[:, None]
        return torch.cat([*(g.float().flatten(1) for g in gradients), shared.flatten(1)], 1)

    def pick(gradients):
        """All columns of some heads' gradients, and the rotated key's."""
        return together([g[:, some] for g in gradients[:3]], gradients[3])

    def exact() -> torch.Tensor:
        """Head by head: all of them add to the rotated key's gradient."""
        found, of_rope = [], torch.zeros_like(rope, dtype=torch.float32)
        for head in range(heads):
            leaves = [tensor[:, head : head + 1].float() for tensor in (q, k, v)]
            *own, shared = step(plain, *leaves, rope.float(), toward=toward[:, head : head + 1].float())(0)
            of_rope += shared
            found += [own] if head in looked_at else []
        return together([torch.cat(parts, 1) for parts in zip(*found)], of_rope)

    def call(**more):
        return step(partial(ours, **more), q, k, v, rope)

    problem = Problem(call(), exact, pick, bytes=3 * nbytes, flops=3.5 * flops, graph=False)
    variants(problem, mk.mla_prefill, call, place)
    for name, how in torchs(place).items():
        joined = lambda q, k, v, rope, how=how: sdpa(*how, q, with_rope(k, rope), v)  # noqa: E731
        problem.add(name, step(joined, q, k, v, rope))
    return problem


def _case(heads: int, tokens: int, priority: int) -> Case:
    return Case(
        f"prefill h{heads} {tokens}", "prefill", "prefill, bf16", priority,
        partial(forward, heads, tokens, (NOPE, ROPE, VALUE)), {"FlashAttention-3": 0.97, "cuDNN": 1.15},
    )  # fmt: skip


def _gradients(heads: int, tokens: int, priority: int) -> Case:
    return Case(
        f"prefill fwd+bwd h{heads} {tokens}", "prefill", "prefill, forward and backward", priority,
        partial(backward, heads, tokens, (NOPE, ROPE, VALUE)), {"cuDNN": 1.0},
    )  # fmt: skip


CASES = (
    _case(128, 8192, 0),
    _case(16, 2048, 0),
    _case(16, 8192, 1),
    _case(128, 2048, 1),
    _gradients(16, 4096, 0),
    _gradients(128, 2048, 1),
    Case("prefill glm-5 h8 8192", "prefill", "prefill, bf16, 256 / 256", 2, partial(forward, 8, 8192, GLM_5)),
    Case(
        "prefill fwd+bwd glm-5 h8 4096",
        "prefill",
        "prefill, forward and backward, 256 / 256",
        2,
        partial(backward, 8, 4096, GLM_5),
    ),
)
