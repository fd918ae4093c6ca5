"""Seeded problems for mla_prefill: ragged sequences with poisoned neighbours, and what the reference makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.reference import prefill as reference
from tests.support import assert_close

POISON = 3  # keys of the sequences between the real ones, which have no query


@dataclass
class Problem:
    """Arguments of one ``mla_prefill`` call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool = True
    k_rope: torch.Tensor | None = None

    def run(self, **changes) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_prefill(**{**vars(self), **changes})

    def arguments(self) -> tuple:
        """Positional arguments of the op and of its launcher."""
        return (
            self.q, self.k, self.v, self.k_rope, self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q,
            self.max_seqlen_k, self.softmax_scale, self.causal,
        )  # fmt: skip

    def with_inputs(self, make) -> "Problem":
        """The same call on ``make(tensor)`` of q, k, v and k_rope."""
        names = [name for name in ("q", "k", "v", "k_rope") if getattr(self, name) is not None]
        return Problem(**{**vars(self), **{name: make(getattr(self, name)) for name in names}})

    def inputs(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.q, self.k, self.v, self.k_rope) if tensor is not None]

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference, computed in ``dtype``."""
        with torch.no_grad():
            return reference.mla_prefill(**vars(self.with_inputs(lambda tensor: tensor.cpu().to(dtype))))

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Hold a result against float64, with torch's own error in the dtype beside it."""
        dtype = self.q.dtype
        baseline = self.expected(dtype) if dtype != torch.float32 else (None, None)
        for actual, exact, own in zip(result, self.expected(torch.float64), baseline):
            assert_close(actual.detach().cpu(), exact, own)

    def gradients(self, run=None, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Gradients of q, k, v and k_rope of a seeded weighting of out and lse, through ``run``."""
        leaves = self.with_inputs(
            lambda tensor: (tensor if dtype is None else tensor.cpu().to(dtype)).detach().requires_grad_()
        )
        out, lse = (run or mla_prefill)(**vars(leaves))
        generator = torch.Generator().manual_seed(1)
        out_weights = torch.randn(out.shape, generator=generator).to(self.q.dtype)
        lse_weights = torch.randn(lse.shape, generator=generator)
        loss = (out * out_weights.to(out)).sum() + (lse.masked_fill(lse.isinf(), 0.0) * lse_weights.to(lse)).sum()
        return list(torch.autograd.grad(loss, leaves.inputs()))

    def check_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Hold gradients against fp64 autograd of the reference, with the reference's own in the dtype beside them."""
        dtype = self.q.dtype
        exact = self.gradients(reference.mla_prefill, torch.float64)
        own = [None] * 4 if dtype == torch.float32 else self.gradients(reference.mla_prefill, dtype)
        for got, want, baseline in zip(gradients, exact, own, strict=False):
            assert got.dtype == dtype
            assert_close(got.cpu(), want, baseline)

    def sequence(self, index: int) -> "Problem":
        """The same call for one sequence alone, its neighbours cut off."""
        rows = slice(*self.cu_seqlens_q[index : index + 2].tolist())
        keys = slice(*self.cu_seqlens_k[index : index + 2].tolist())
        bounds = [torch.tensor([0, s.stop - s.start], dtype=torch.int32, device=self.q.device) for s in (rows, keys)]
        return Problem(
            self.q[rows], self.k[keys], self.v[keys], *bounds, self.max_seqlen_q, self.max_seqlen_k,
            self.softmax_scale, self.causal, None if self.k_rope is None else self.k_rope[keys],
        )  # fmt: skip


def make(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int = 3,
    key: int = 32,
    rope: int = 16,
    value: int = 32,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
    poison: bool = True,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem of sequences with (queries, keys) of these lengths. Between them stand sequences without a query, whose
    keys are NaN: no gradient and no result may come near them."""
    if poison:
        lengths = [(0, POISON), *(pair for length in lengths for pair in (length, (0, POISON)))]
    queries, keys = ([pair[side] for pair in lengths] for side in (0, 1))
    bounds = [torch.tensor([0, *side], dtype=torch.int32).cumsum(0, dtype=torch.int32) for side in (queries, keys)]
    sequence = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(keys, dtype=torch.long))

    def rows(*shape):
        tensor = torch.randn(sum(keys), *shape)
        if poison:
            tensor[sequence % 2 == 0] = float("nan")
        return tensor.to(device, dtype)

    return Problem(
        q=torch.randn(sum(queries), heads, key + rope).to(device, dtype),
        k=rows(heads, key),
        v=rows(heads, value),
        cu_seqlens_q=bounds[0].to(device),
        cu_seqlens_k=bounds[1].to(device),
        max_seqlen_q=max(queries, default=0),
        max_seqlen_k=max(keys, default=0),
        softmax_scale=(key + rope) ** -0.5,
        causal=causal,
        k_rope=rows(rope) if rope else None,
    )
