"""What the sparse ops refuse, in which words, and that they refuse before they allocate or write."""

import pytest
import torch

from mla_kernels.attention.sparse import op as sparse
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.latent.cache import LatentCache
from tests.attention.sparse_problems import make_decode, make_prefill
from tests.support import not_on

pytestmark = pytest.mark.usefixtures("cpu_code")


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def reached(*arguments):
    raise AssertionError("the op was reached")


def other_layout(p):
    return LatentCache.allocate(4, 16, latent_dim=64, rope_dim=16, layout="int8")


DECODE = {
    "q no tensor": (dict(q=[1.0]), TypeError, "q: got list"),
    "q rank": (lambda p: dict(q=p.q[0]), ValueError, r"q: got shape \(2, 3, 80\), \(any, any, any, 80\)"),
    "q dtype": (lambda p: dict(q=p.q.half()), TypeError, "q: got dtype float16, accepted: float32"),
    "q device": (lambda p: dict(q=p.q.to("meta")), ValueError, "q: got a tensor on meta"),
    "q strided": (lambda p: dict(q=strided(p.q)), ValueError, "q: got stride 2 in the last dimension"),
    "no heads": (lambda p: dict(q=p.q[:, :, :0]), ValueError, "q: got shape .* one head"),
    "no queries": (lambda p: dict(q=p.q[:, :0]), ValueError, "q: got shape .* one query token"),
    "cache a tensor": (lambda p: dict(cache=p.cache.data), TypeError, "cache: got Tensor, a LatentCache"),
    "cache empty": (lambda p: dict(cache=LatentCache(p.cache.data[:0], 64)), ValueError, "cache: got 0 pages"),
    "cache quantised": (lambda p: dict(cache=other_layout(p)), TypeError, "q: got dtype float32, accepted: bfloat16"),
    "cache too large": (
        lambda p: dict(cache=LatentCache(torch.empty(1, 1, 80).expand(2, 1 << 30, 80), 64)),  # never read
        ValueError,
        "cache: got 2,147,483,648 slots, less than",
    ),
    "indices rank": (lambda p: dict(indices=p.indices[0]), ValueError, r"indices: got shape \(2, 9\), \(2, 2, any\)"),
    "indices tokens": (lambda p: dict(indices=p.indices[:, :1]), ValueError, r"indices: got shape \(2, 1, 9\)"),
    "indices dtype": (lambda p: dict(indices=p.indices.long()), TypeError, "indices: got dtype int64, accepted: int32"),
    "indices device": (lambda p: dict(indices=p.indices.to("meta")), ValueError, "indices: got a tensor on meta"),
    "indices strided": (lambda p: dict(indices=strided(p.indices)), ValueError, "indices: got stride 2"),
    "indices none": (dict(indices=None), TypeError, "indices: got NoneType"),
    "length shape": (lambda p: dict(topk_length=torch.zeros(3).int()), ValueError, "topk_length: got shape"),
    "length dtype": (lambda p: dict(topk_length=torch.zeros(2)), TypeError, "topk_length: got dtype float32"),
    "sink shape": (dict(sink=torch.zeros(2)), ValueError, r"sink: got shape \(2,\), \(3\) is accepted"),
    "sink dtype": (dict(sink=torch.zeros(3).half()), TypeError, "sink: got dtype float16, accepted: float32"),
    "scale tensor": (dict(softmax_scale=torch.tensor(0.1)), TypeError, "softmax_scale: got Tensor"),
    "extra without cache": (lambda p: dict(extra_cache=None), ValueError, "extra_indices: got a tensor without extra"),
    "extra length alone": (
        lambda p: dict(extra_cache=None, extra_indices=None, extra_topk_length=torch.zeros(2).int()),
        ValueError,
        "extra_topk_length: got a tensor without extra_cache",
    ),
    "extra without indices": (dict(extra_indices=None), TypeError, "extra_indices: got NoneType"),
    "extra a tensor": (lambda p: dict(extra_cache=p.cache.data), TypeError, "extra_cache: got Tensor"),
    "extra width": (
        lambda p: dict(extra_cache=LatentCache(p.extra_cache.data[..., :48], 32)), ValueError, "extra_cache.data: got"
    ),
    "extra latent": (
        lambda p: dict(extra_cache=LatentCache(p.extra_cache.data, 16)),
        NotImplementedError,
        "extra_cache: got layout latent_32bit with latent_dim 16, that of cache is accepted",
    ),
    "extra dtype": (
        lambda p: dict(extra_cache=LatentCache(p.extra_cache.data.half(), 64)), TypeError, "extra_cache.data: got dtype"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODE)
def test_decode_refuses(name, monkeypatch):
    problem = make_decode(9, queries=2, extra_top_k=4)
    problem.run()
    monkeypatch.setattr(sparse, "_sparse_mla_decode", reached)
    changes, error, words = DECODE[name]
    with pytest.raises(error, match=words):
        problem.run(**(changes(problem) if callable(changes) else changes))


def test_an_extra_cache_of_another_layout_is_refused():
    problem = make_decode(9, extra_top_k=4, dtype=torch.bfloat16, latent_dim=128, rope_dim=64, layout="int8")
    other = LatentCache(problem.extra_cache.data, 128, "fp8_v32")
    with pytest.raises(NotImplementedError, match="extra_cache: got layout fp8_v32 with latent_dim 128, that of cache"):
        problem.run(extra_cache=other)


PREFILL = {
    "q rank": (lambda p: dict(q=p.q[0]), ValueError, "q: got 2 dimensions"),
    "q float64": (lambda p: dict(q=p.q.double()), TypeError, "q: got dtype float64"),
    "no heads": (lambda p: dict(q=p.q[:, :0]), ValueError, "q: got shape .* one head"),
    "kv dtype": (lambda p: dict(kv=p.kv.half()), TypeError, "kv: got dtype float16, accepted: float32"),
    "kv width": (lambda p: dict(kv=p.kv[:, :64].contiguous()), ValueError, r"kv: got shape \(52, 64\), \(any, 80\)"),
    "kv empty": (lambda p: dict(kv=p.kv[:0]), ValueError, "kv: got 0 rows"),
    "latent_dim": (dict(latent_dim=48), ValueError, "latent_dim: got 48 in a cache 80 wide, powers of two"),
    "latent_dim too wide": (dict(latent_dim=128), ValueError, "rope_dim: got -48"),
    "rope_dim": (dict(latent_dim=32), ValueError, "rope_dim: got 48"),
    "latent_dim float": (dict(latent_dim=64.0), TypeError, "latent_dim: got float"),
    "indices tokens": (lambda p: dict(indices=p.indices[:2]), ValueError, r"indices: got shape \(2, 9\), \(4, any\)"),
    "indices dtype": (lambda p: dict(indices=p.indices.long()), TypeError, "indices: got dtype int64"),
    "length shape": (dict(topk_length=torch.zeros(3).int()), ValueError, "topk_length: got shape"),
    "sink shape": (dict(sink=torch.zeros(2)), ValueError, r"sink: got shape \(2,\), \(3\) is accepted"),
    "scale bool": (dict(softmax_scale=True), TypeError, "softmax_scale: got bool"),
    "max logits": (dict(return_max_logits=1), TypeError, "return_max_logits: got int, a bool"),
}


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_refuses(name, monkeypatch):
    problem = make_prefill(4, 9)
    problem.run()
    monkeypatch.setattr(sparse, "_sparse_mla_prefill", reached)
    changes, error, words = PREFILL[name]
    with pytest.raises(error, match=words):
        problem.run(**(changes(problem) if callable(changes) else changes))


def test_a_gradient_is_not_lost():
    problem = make_decode(9)
    with pytest.raises(NotImplementedError, match="sparse_mla_decode has no backward and q requires grad"):
        problem.run(q=problem.q.requires_grad_())


@pytest.mark.parametrize("argument, value, words", [
    ("topk_length", [10, 0], "topk_length: got values from 0 to 10, accepted: 0 to 9"),
    ("topk_length", [3, -1], "topk_length: got values from -1 to 3"),
    ("extra_topk_length", [5, 0], "extra_topk_length: got values from 0 to 5, accepted: 0 to 4"),
    ("sink", [0.0, float("nan"), 0.0], "sink: got NaN"),
])  # fmt: skip
@not_on("values of device tensors are not read", "cuda", "npu")
@pytest.mark.no_launch("refused before a launch")
def test_values_are_refused(backend, argument, value, words):
    problem = make_decode(9, extra_top_k=4)
    dtype = torch.float32 if argument == "sink" else torch.int32
    with pytest.raises(ValueError, match=words):
        problem.run(**{argument: torch.tensor(value, dtype=dtype)})
    if not argument.startswith("extra"):
        problem = make_prefill(len(value), 9)
        with pytest.raises(ValueError, match=words):
            problem.run(**{argument: torch.tensor(value, dtype=dtype)})


def test_keywords():
    problem = make_decode(3)
    with pytest.raises(TypeError):
        sparse_mla_decode(problem.q, problem.cache, problem.indices, 0.1)
    with pytest.raises(TypeError):
        sparse_mla_prefill(problem.q[0], problem.cache.data[0], problem.indices[0], 0.1)
