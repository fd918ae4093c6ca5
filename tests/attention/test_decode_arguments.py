"""What mla_decode refuses, in which words, and that it refuses before it allocates or writes."""

import pytest
import torch

from mla_kernels.attention.decode import op as decode
from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.latent.cache import LatentCache
from tests.attention.problems import make
from tests.support import not_on

pytestmark = pytest.mark.usefixtures("cpu_code")


@pytest.fixture
def problem(monkeypatch):
    problem = make([70, 3], queries=2)
    problem.run()

    def reached(*arguments):
        raise AssertionError("the op was reached")

    monkeypatch.setattr(decode, "_mla_decode", reached)
    return problem


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


REFUSED = {
    "q no tensor": (dict(q=[1.0]), TypeError, "q: got list"),
    "q rank": (lambda p: dict(q=p.q[0]), ValueError, r"q: got shape \(2, 3, 80\), \(any, any, any, 80\)"),
    "q width": (lambda p: dict(q=p.q[..., :64].contiguous()), ValueError, r"q: got shape .*any, any, any, 80"),
    "q dtype": (lambda p: dict(q=p.q.half()), TypeError, "q: got dtype float16, accepted: float32"),
    "q float64": (lambda p: dict(q=p.q.double()), TypeError, "q: got dtype float64"),
    "q device": (lambda p: dict(q=p.q.to("meta")), ValueError, "q: got a tensor on meta"),
    "q strided": (lambda p: dict(q=strided(p.q)), ValueError, "q: got stride 2 in the last dimension"),
    "no queries": (lambda p: dict(q=p.q[:, :0]), ValueError, "q: got shape .* at least one query token"),
    "no heads": (lambda p: dict(q=p.q[:, :, :0]), ValueError, "q: got shape .* one head"),
    "cache a tensor": (lambda p: dict(cache=p.cache.data), TypeError, "cache: got Tensor, a LatentCache"),
    "cache empty": (lambda p: dict(cache=LatentCache(p.cache.data[:0], 64)), ValueError, "cache: got 0 pages"),
    "cache width": (lambda p: dict(cache=LatentCache(p.cache.data[..., :48], 32)), ValueError, "q: got shape"),
    "table rank": (lambda p: dict(block_table=p.block_table[0]), ValueError, "block_table: got shape"),
    "table batch": (lambda p: dict(block_table=p.block_table[:1]), ValueError, r"block_table: got shape \(1, 2\)"),
    "table dtype": (lambda p: dict(block_table=p.block_table.long()), TypeError, "block_table: got dtype int64"),
    "table device": (lambda p: dict(block_table=p.block_table.to("meta")), ValueError, "block_table: got a tensor on"),
    "table strided": (lambda p: dict(block_table=strided(p.block_table)), ValueError, "block_table: got stride 2"),
    "table too wide": (
        lambda p: dict(cache=LatentCache(torch.empty(1, 1, 80).expand(1, 1 << 29, 80), 64)),  # never read
        ValueError,
        "block_table: got 2 pages of 536870912 tokens a sequence, less than",
    ),
    "odd large pages": (
        lambda p: dict(cache=LatentCache(torch.empty(1, 1, 80).expand(1, (1 << 19) + 8, 80), 64)),  # never read
        ValueError,
        "page_size: got 524,296, less than 524,288 and multiples of 256 are accepted",
    ),
    "many query rows": (
        lambda p: dict(q=torch.empty(1, 1, 1, 80).expand(2, 1 << 19, 3, 80)),  # never read
        ValueError,
        "q: got 524288 query tokens of 3 heads, at most 1,048,576 together are accepted",
    ),
    "lengths shape": (lambda p: dict(seq_lens=p.seq_lens[:1]), ValueError, r"seq_lens: got shape \(1,\), \(2\)"),
    "lengths dtype": (lambda p: dict(seq_lens=p.seq_lens.long()), TypeError, "seq_lens: got dtype int64"),
    "lengths device": (lambda p: dict(seq_lens=p.seq_lens.to("meta")), ValueError, "seq_lens: got a tensor on meta"),
    "scale tensor": (dict(softmax_scale=torch.tensor(0.1)), TypeError, "softmax_scale: got Tensor"),
    "causal int": (dict(causal=1), TypeError, "causal: got int, a bool"),
    "window zero": (dict(window=0), ValueError, "window: got 0, an integer of at least 1"),
    "window float": (dict(window=2.0), TypeError, "window: got float, an integer of at least 1"),
    "window bool": (dict(window=True), TypeError, "window: got bool"),
    "window not causal": (dict(window=9, causal=False), ValueError, "window: got 9 with causal=False, .* causal=True"),
    "sink no tensor": (dict(sink=0.0), TypeError, "sink: got float"),
    "sink of other heads": (lambda p: dict(sink=torch.zeros(2)), ValueError, r"sink: got shape \(2,\), \(3\)"),
    "sink dtype": (lambda p: dict(sink=torch.zeros(3).bfloat16()), TypeError, "sink: got dtype bfloat16, .* float32"),
    "sink device": (lambda p: dict(sink=torch.zeros(3, device="meta")), ValueError, "sink: got a tensor on meta"),
    "another layout": (
        lambda p: dict(cache=LatentCache.allocate(2, 64, latent_dim=128, rope_dim=16, layout="fp8_v32")),
        ValueError,
        r"q: got shape \(2, 2, 3, 80\), \(any, any, any, 144\)",
    ),
    "q for another layout": (
        lambda p: dict(cache=LatentCache.allocate(2, 64, latent_dim=64, rope_dim=16, layout="int8")),
        TypeError,
        "q: got dtype float32, accepted: bfloat16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(problem, name):
    changes, error, words = REFUSED[name]
    changes = changes(problem) if callable(changes) else changes
    with pytest.raises(error, match=words):
        problem.run(**changes)


def test_a_gradient_is_not_lost(problem):
    with pytest.raises(NotImplementedError, match="mla_decode has no backward and q requires grad"):
        problem.run(q=problem.q.requires_grad_())


def test_no_gradient_of_a_sink_is_lost(problem):
    with pytest.raises(NotImplementedError, match="mla_decode has no backward and sink requires grad"):
        problem.run(sink=torch.zeros(3, requires_grad=True))


@not_on("values of device tensors are not read", "cuda", "npu")
@pytest.mark.no_launch("refused before a launch")
def test_a_sink_of_nan_is_refused(backend):
    with pytest.raises(ValueError, match="sink: got NaN for 1 heads, any other number is accepted"):
        make([3]).run(sink=torch.tensor([0.0, float("nan"), 1.0]))


def test_table_entries_before_the_window_are_not_checked(backend, device):
    problem = make([200, 70], window=10, queries=2, device=device)
    assert (problem.block_table[0, :2] < 0).any() or (problem.block_table[0, :2] > problem.cache.num_pages).any()
    problem.check(problem.run())
    if backend not in ("cuda", "npu"):
        problem.block_table[0, 2] = -1
        with pytest.raises(ValueError, match="block_table: got values from -1"):
            problem.run()


VALUES = {
    "length negative": ("seq_lens", 1, -1, "seq_lens: got values from -1 to 70, accepted: 0 to 128"),
    "length beyond the table": ("seq_lens", 0, 129, "seq_lens: got values from 3 to 129, .*2 pages of 64"),
    "page negative": ("block_table", (0, 1), -1, "block_table: got values from -1"),
    "page too large": ("block_table", (1, 0), 5, "block_table: got values from .* to 5, accepted: 0 to 4"),
}


@pytest.mark.parametrize("name", VALUES)
@not_on("values of device tensors are not read", "cuda", "npu")
@pytest.mark.no_launch("refused before a launch")
def test_values_are_refused(backend, name):
    argument, where, value, words = VALUES[name]
    problem = make([70, 3])
    getattr(problem, argument)[where] = value
    with pytest.raises(ValueError, match=words):
        problem.run()


def test_keywords():
    problem = make([3])
    with pytest.raises(TypeError):
        mla_decode(problem.q, problem.cache, problem.block_table, problem.seq_lens, 0.1)
