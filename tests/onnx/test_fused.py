"""Fused operators of onnxruntime in place of forms, beside the library's ops; and what they refuse."""

import pytest
import torch

import mla_kernels as mk
import mla_kernels.onnx
from mla_kernels import launch
from tests.onnx.problems import OTHERS, TOKENS, run, session
from tests.support import assert_close

EXPERTS, HIDDEN, INNER, TOP_K = 8, 64, 32, 3


@pytest.fixture(autouse=True)
def _torch_mode():
    with launch.on_cpu("torch"):
        yield


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def compare(function, example, dynamic, fused, operator, accepted=1e-5):
    """``function`` of ``example(tokens)`` in onnxruntime, with one node of ``operator``, beside torch."""
    given = example(TOKENS)
    model = mk.onnx.export(Call(function).eval(), given, dynamic_shapes=(dynamic,), fused=fused)
    assert [node.op_type for node in model.model.graph].count(operator) == 1
    runtime = session(model)
    for tokens in (TOKENS, *OTHERS, 1):
        given = example(tokens)
        results = run(runtime, given)
        wanted = function(*given)
        for got, want in zip(results, wanted if isinstance(wanted, tuple) else (wanted,)):
            if want.dtype.is_floating_point:
                assert_close(got, want.double(), accepted=accepted)
            else:
                assert got.equal(want)


def weights():
    torch.manual_seed(0)
    return torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.1, torch.randn(EXPERTS, HIDDEN, INNER) * 0.1


def slots(tokens):
    torch.manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K].int().contiguous()
    ids[-1, 1] = -1
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K), ids


_TOKENS = ({0: "tokens"}, {0: "tokens"}, {0: "tokens"})


@pytest.mark.parametrize(
    "activation",
    [mk.Activation(), mk.Activation("pre", 0.7), mk.Activation("gpt_oss", 0.7, interleaved=True)],
    ids=lambda activation: activation.clamp,
)
def test_experts(activation):
    gate_up, down = weights()

    def call(hidden, factors, ids):
        return mk.fused_moe(hidden, gate_up, down, factors, ids, activation=activation)

    compare(call, slots, _TOKENS, "experts", "MoE")


def test_int8_experts():
    coded = mk.ExpertWeights.quantise(*weights(), "int8")

    def call(hidden, factors, ids):
        return mk.fused_experts(hidden, coded, factors, ids)

    compare(call, slots, _TOKENS, "experts", "QMoE")


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_router(groups):
    torch.manual_seed(0)
    bias = torch.randn(16)

    def call(logits):
        return mk.route(logits, 3, bias=bias, num_groups=groups[0], top_k_groups=groups[1], routed_scale=2.5)

    compare(call, lambda n: (torch.randn(n, 16),), ({0: "tokens"},), "router", "MoEGroupRouter")


@pytest.mark.parametrize("causal", [True, False])
def test_decode(causal):
    def example(n):
        torch.manual_seed(n)
        table, lengths = torch.randperm(4 * n).view(n, 4).int(), torch.randint(0, 17, (n,), dtype=torch.int32)
        return torch.randn(n, 2, 3, 48), torch.randn(4 * n, 4, 48), table, lengths, torch.randn(3)

    def call(q, data, table, lengths, sink):
        cache = mk.LatentCache(data, 32)
        return mk.mla_decode(q, cache, table, lengths, softmax_scale=0.2, causal=causal, sink=sink)

    dynamic = ({0: "batch"}, {0: "pages"}, {0: "batch"}, {0: "batch"}, None)
    compare(call, example, dynamic, "attention", "Attention")


def test_prefill():
    def example(n):
        torch.manual_seed(n)
        bounds = torch.tensor([0, n // 2, n], dtype=torch.int32)
        return torch.randn(n, 3, 48), torch.randn(n, 3, 32), torch.randn(n, 3, 16), torch.randn(n, 16), bounds

    def call(q, k, v, k_rope, bounds):
        longest = q.shape[0]
        return mk.mla_prefill(
            q, k, v, bounds, bounds, k_rope=k_rope, softmax_scale=0.2, max_seqlen_q=longest, max_seqlen_k=longest
        )

    tokens = {0: "tokens"}
    compare(call, example, (tokens, tokens, tokens, tokens, None), "attention", "Attention")


def test_what_fused_experts_do_not_compute():
    gate_up, down = weights()
    coded = mk.ExpertWeights.quantise(torch.randn(2, 256, 128), torch.randn(2, 128, 128), "mxfp4")
    hidden, factors, ids = slots(TOKENS)

    def refused(message, function, *given, fused="experts"):
        with pytest.raises(NotImplementedError, match=message):
            mk.onnx.export(Call(function).eval(), given, fused=fused)

    refused("weight_at='input'", lambda *x: mk.fused_moe(x[0], gate_up, down, *x[1:], weight_at="input"), hidden,
            factors, ids)  # fmt: skip
    post = mk.Activation("post", 1.0)
    refused("clamp='post'", lambda *x: mk.fused_moe(x[0], gate_up, down, *x[1:], activation=post), hidden, factors,
            ids)  # fmt: skip
    refused("format 'mxfp4'", lambda *x: mk.fused_experts(x[0], coded, *x[1:]), torch.randn(2, 128),
            torch.rand(2, 1), torch.zeros(2, 1, dtype=torch.int32))  # fmt: skip
    refused("scoring='softmax'", lambda x: mk.route(x, 2, scoring="softmax"), torch.randn(5, 8), fused="router")
