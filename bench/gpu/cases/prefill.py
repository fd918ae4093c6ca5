"""Causal attention of a prompt over expanded keys, 192 / 128 wide and GLM-5's 256 / 256: forward, and forward with
gradients."""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

LOOKED_AT_HEADS = 2


class Widths(NamedTuple):
    """Columns of a head's own key, of the rotated one that all share, and of a value."""

    nope: int
    rope: int
    value: int

    @property
    def key(self) -> int:
        return self.nope + self.rope

    @property
    def scale(self) -> float:
        return self.key**-0.5


V3, GLM5 = Widths(128, 64, 128), Widths(192, 64, 256)


def with_rope(k: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Keys of every head, [tokens, heads, key], from [tokens, heads, nope] and the one rope part [tokens, rope]."""
    return torch.cat([k, rope[:, None].expand(-1, k.shape[1], -1)], -1)


def exact_rows(q, key, v, rows: list[int], scale: float) -> torch.Tensor:
    scores = torch.einsum("thd,khd->htk", q[rows].float(), key.float()) * scale
    seen = torch.arange(len(key), device=q.device) <= torch.tensor(rows, device=q.device)[:, None]
    return torch.einsum("htk,khd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v.float())


def sdpa(backend: SDPBackend, width: int, q, key, v):
    """torch's attention by ``backend``, with values padded to ``width``."""
    value = v.shape[-1]
    v = pad(v, (0, width - value)) if width > value else v
    heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (q, key, v)]
    with sdpa_kernel([backend]):
        out = scaled_dot_product_attention(*heads_first, is_causal=True, scale=q.shape[-1] ** -0.5)
    return out[0].transpose(0, 1)[..., :value]


def torchs(place: Place, widths: Widths) -> dict[str, tuple[SDPBackend, int]]:
    """torch's kernels: name -> backend, width of values. Its default on a CPU."""
    if not place.gpu:
        return {"torch": (SDPBackend.MATH, widths.value)}
    padded = ", values padded" if widths.value < widths.key else ""
    if torch.version.hip:
        return {f"torch, flash{padded}": (SDPBackend.FLASH_ATTENTION, widths.key)}
    return {
        "cuDNN": (SDPBackend.CUDNN_ATTENTION, widths.value),
        f"FlashAttention-2{padded}": (SDPBackend.FLASH_ATTENTION, widths.key),
    }


def tensors(widths: Widths, heads: int, tokens: int, place: Place):
    """q, k, v, rope and our call's function of them, with more keywords."""
    nope, rope_width, value = widths
    q, kv = place.normal(tokens, heads, widths.key), place.normal(tokens, heads, nope + value)
    rope = place.normal(tokens, rope_width)
    k, v = kv.split([nope, value], -1)
    bounds = place.ints(torch.tensor([0, tokens]))

    def ours(q, k, v, rope, **more):
        sizes = dict(max_seqlen_q=tokens, max_seqlen_k=tokens, softmax_scale=widths.scale)
        return mk.mla_prefill(q, k, v, bounds, bounds, k_rope=rope, **sizes, **more)[0]

    flops = 2 * heads * (tokens * (tokens + 1) / 2) * (widths.key + value)
    nbytes = 2 * tokens * (heads * (widths.key + nope + 2 * value) + rope_width)
    return q, k, v, rope, bounds, ours, flops, nbytes


def forward(widths: Widths, heads: int, tokens: int, place: Place, peers) -> Problem:
    tokens, heads = place.size(tokens, 96), place.size(heads, 4)
    q, k, v, rope, bounds, ours, flops, nbytes = tensors(widths, heads, tokens, place)
    key = with_rope(k, rope)
    rows = sorted({0, 1, tokens // 3, tokens - 2, tokens - 1})

    def call(**more):
        return lambda copy: ours(q, k, v, rope, **more)

    def exact() -> torch.Tensor:
        return exact_rows(q, key, v, rows, widths.scale)

    problem = Problem(call(), exact, lambda out: out[rows], bytes=nbytes, flops=flops)
    variants(problem, mk.mla_prefill, call, place)
    for name, (backend, width) in torchs(place, widths).items():
        problem.add(name, lambda copy, backend=backend, width=width: sdpa(backend, width, q, key, v))
    if peers.fa3:
        attend = partial(peers.fa3.attend, softmax_scale=widths.scale)
        lengths = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=tokens, max_seqlen_k=tokens)
        problem.add("FlashAttention-3", lambda copy: attend(q[None], key[None], v[None])[0])
        problem.add("FlashAttention-3, variable lengths", lambda copy: attend(q, key, v, **lengths))
        problem.add(
            "FlashAttention-3 with concatenation", lambda copy: attend(q[None], with_rope(k, rope)[None], v[None])[0]
        )
    return problem


def backward(widths: Widths, heads: int, tokens: int, place: Place, peers) -> Problem:
    tokens, heads = place.size(tokens, 96), place.size(heads, 4)
    q, k, v, rope, _, ours, flops, nbytes = tensors(widths, heads, tokens, place)
    k, v, toward = k.contiguous(), v.contiguous(), place.normal(tokens, heads, widths.value)
    some = slice(0, min(heads, LOOKED_AT_HEADS))

    def step(function, *leaves, toward=toward):
        def run(copy: int):
            with torch.enable_grad():
                fresh = [leaf.detach().requires_grad_() for leaf in leaves]
                return torch.autograd.grad(function(*fresh), fresh, toward)

        return run

    def plain(q, k, v, rope):
        scores = torch.einsum("thd,khd->htk", q, with_rope(k, rope)) * widths.scale
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        return torch.einsum("htk,khd->thd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v)

    def pick(gradients):
        """Gradients of the first columns of queries, keys and values, of some heads. The rope part's sums all heads."""
        columns = min(widths.nope, widths.value)
        return torch.stack([g[:, some].float()[..., :columns] for g in gradients[:3]])

    def exact() -> torch.Tensor:
        part = [q[:, some].float(), k[:, some].float(), v[:, some].float(), rope.float()]
        return pick(step(plain, *part, toward=toward[:, some].float())(0))

    def call(**more):
        return step(partial(ours, **more), q, k, v, rope)

    problem = Problem(call(), exact, pick, bytes=3 * nbytes, flops=3.5 * flops, graph=False)
    variants(problem, mk.mla_prefill, call, place)
    for name, (backend, width) in torchs(place, widths).items():
        joined = lambda q, k, v, rope, b=backend, w=width: sdpa(b, w, q, with_rope(k, rope), v)  # noqa: E731
        problem.add(name, step(joined, q, k, v, rope))
    return problem


FORWARD, TRAINING = "prefill, bf16", "prefill, forward and backward"


def _case(heads: int, tokens: int, priority: int) -> Case:
    return Case(f"prefill h{heads} {tokens}", "prefill", FORWARD, priority, partial(forward, V3, heads, tokens))


CASES = (
    _case(128, 8192, 0),
    _case(16, 2048, 0),
    _case(16, 8192, 1),
    _case(128, 2048, 1),
    Case("prefill fwd+bwd h16 4096", "prefill", TRAINING, 0, partial(backward, V3, 16, 4096)),
    Case("prefill fwd+bwd h128 2048", "prefill", TRAINING, 1, partial(backward, V3, 128, 2048)),
    Case("prefill glm5 h64 4096", "prefill", FORWARD, 1, partial(forward, GLM5, 64, 4096)),
    Case("prefill glm5 fwd+bwd h64 2048", "prefill", TRAINING, 1, partial(backward, GLM5, 64, 2048)),
)
