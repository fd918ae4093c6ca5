"""What mla_prefill refuses, in which words, and that it refuses before it allocates or writes."""

import pytest
import torch

from mla_kernels.attention.prefill import op as prefill
from mla_kernels.attention.prefill.op import mla_prefill
from tests.attention.prefill_problems import make
from tests.support import not_on

pytestmark = pytest.mark.usefixtures("cpu_code")


@pytest.fixture
def problem(monkeypatch):
    problem = make([(20, 70), (5, 5)], poison=False)
    problem.run()

    def reached(*arguments):
        raise AssertionError("the op was reached")

    monkeypatch.setattr(prefill, "_mla_prefill", reached)
    return problem


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def widened(p, key=0, value=0, rope=0):
    """The problem's tensors of these widths, and a query that fits."""
    key, value, rope = key or p.k.shape[2], value or p.v.shape[2], rope or p.k_rope.shape[1]
    return dict(
        q=p.q.new_empty(25, 3, key + rope), k=p.k.new_empty(75, 3, key), v=p.v.new_empty(75, 3, value),
        k_rope=p.k_rope.new_empty(75, rope),
    )  # fmt: skip


REFUSED = {
    "q no tensor": (dict(q=[1.0]), TypeError, "q: got list"),
    "q rank": (lambda p: dict(q=p.q[0]), ValueError, r"q: got 2 dimensions \(3, 48\), 3 are accepted"),
    "q width": (lambda p: dict(q=p.q[..., :32]), ValueError, "q: got width 32, 48 is accepted"),
    "q without rope": (dict(k_rope=None), ValueError, "q: got width 48, 32 is accepted"),
    "q float64": (lambda p: dict(q=p.q.double()), TypeError, "q: got dtype float64"),
    "q strided": (lambda p: dict(q=strided(p.q)), ValueError, "q: got stride 2 in the last dimension"),
    "q far apart": (
        lambda p: dict(q=torch.empty(2, (1 << 22) + 8)[:, :144].view(2, 3, 48)),
        ValueError,
        "q: got stride 4194312 between tokens, at most 4194304",
    ),
    "no heads": (lambda p: dict(q=p.q[:, :0]), ValueError, "q: got shape .* at least one head"),
    "k heads": (lambda p: dict(k=p.k[:, :2]), ValueError, r"k: got shape \(75, 2, 32\), \(any, 3, any\)"),
    "k dtype": (lambda p: dict(k=p.k.half()), TypeError, "k: got dtype float16, accepted: float32"),
    "k device": (lambda p: dict(k=p.k.to("meta")), ValueError, "k: got a tensor on meta"),
    "k strided": (lambda p: dict(k=strided(p.k)), ValueError, "k: got stride 2"),
    "k 576": (lambda p: widened(p, key=512), NotImplementedError, "k: got width 512, accepted: powers of two from 16"),
    "k 112": (lambda p: widened(p, key=112), NotImplementedError, "k: got width 112, .*sums of two different ones"),
    "k 24": (lambda p: widened(p, key=24), NotImplementedError, "k: got width 24"),
    "v tokens": (lambda p: dict(v=p.v[:70]), ValueError, r"v: got shape \(70, 3, 32\), \(75, 3, any\)"),
    "v dtype": (lambda p: dict(v=p.v.bfloat16()), TypeError, "v: got dtype bfloat16"),
    "v strided": (lambda p: dict(v=strided(p.v)), ValueError, "v: got stride 2"),
    "v 96": (lambda p: widened(p, value=96), NotImplementedError, "v: got width 96, accepted: 16, 32, 64, 128, 256"),
    "k_rope rank": (lambda p: dict(k_rope=p.k), ValueError, r"k_rope: got shape \(75, 3, 32\), \(75, any\)"),
    "k_rope dtype": (lambda p: dict(k_rope=p.k_rope.half()), TypeError, "k_rope: got dtype float16"),
    "k_rope 48": (
        lambda p: widened(p, rope=48),
        NotImplementedError,
        "k_rope: got width 48, accepted: 16, 32, 64, 128",
    ),
    "bounds rank": (lambda p: dict(cu_seqlens_q=p.cu_seqlens_q[None]), ValueError, "cu_seqlens_q: got 2 dimensions"),
    "bounds dtype": (lambda p: dict(cu_seqlens_q=p.cu_seqlens_q.long()), TypeError, "cu_seqlens_q: got dtype int64"),
    "no bounds": (lambda p: dict(cu_seqlens_q=p.cu_seqlens_q[:0]), ValueError, "cu_seqlens_q: got 0 values"),
    "bounds differ": (lambda p: dict(cu_seqlens_k=p.cu_seqlens_k[:2]), ValueError, r"cu_seqlens_k: got shape \(2,\)"),
    "bounds device": (lambda p: dict(cu_seqlens_k=p.cu_seqlens_k.to("meta")), ValueError, "cu_seqlens_k: got a tensor"),
    "longest negative": (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q: got -1, an integer from 0"),
    "longest tensor": (dict(max_seqlen_k=torch.tensor(7)), TypeError, "max_seqlen_k: got Tensor"),
    "scale tensor": (dict(softmax_scale=torch.tensor(0.1)), TypeError, "softmax_scale: got Tensor"),
    "scale zero": (dict(softmax_scale=0.0), ValueError, "softmax_scale: got 0.0, a finite number above 0"),
    "scale NaN": (dict(softmax_scale=float("nan")), ValueError, "softmax_scale: got nan"),
    "causal int": (dict(causal=1), TypeError, "causal: got int, a bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(problem, name):
    changes, error, words = REFUSED[name]
    changes = changes(problem) if callable(changes) else changes
    with pytest.raises(error, match=words):
        problem.run(**changes)


VALUES = {
    "start": (dict(cu_seqlens_q=[1, 20, 25]), r"cu_seqlens_q: got \[1, 20, 25\], values that rise from 0 to"),
    "end": (
        dict(cu_seqlens_k=[0, 70, 76]),
        r"cu_seqlens_k: got \[0, 70, 76\], values that rise from 0 to at most 75",
    ),
    "falling": (dict(cu_seqlens_k=[0, 90, 75]), r"cu_seqlens_k: got \[0, 90, 75\]"),
    "too long": (dict(max_seqlen_q=19), "max_seqlen_q: got 19, at least 20 is accepted"),
    "keys too long": (dict(max_seqlen_k=69), "max_seqlen_k: got 69, at least 70 is accepted"),
}


@pytest.mark.parametrize("name", VALUES)
@not_on("values of device tensors are not read", "cuda", "npu")
@pytest.mark.no_launch("refused before a launch")
def test_values_are_refused(backend, name):
    changes, words = VALUES[name]
    changes = {key: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for key, v in changes.items()}
    with pytest.raises(ValueError, match=words):
        make([(20, 70), (5, 5)], poison=False).run(**changes)


def test_keywords():
    problem = make([(3, 3)])
    with pytest.raises(TypeError):
        mla_prefill(problem.q, problem.k, problem.v, problem.cu_seqlens_q, problem.cu_seqlens_k, 3, 3, 0.1)
