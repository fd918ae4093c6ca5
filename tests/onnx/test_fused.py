"""Fused operators of onnxruntime in place of forms, beside the library's ops; and what they refuse."""

from collections import Counter

import pytest
import torch

import mla_kernels as mk
import mla_kernels.onnx
from mla_kernels import launch
from tests.onnx.problems import OTHERS, TOKENS, Call, run, session
from tests.support import assert_close

EXPERTS, HIDDEN, INNER, TOP_K = 8, 64, 32, 3


@pytest.fixture(autouse=True)
def _torch_mode():
    with launch.on_cpu("torch"):
        yield


def weights():
    torch.manual_seed(0)
    return torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.1, torch.randn(EXPERTS, HIDDEN, INNER) * 0.1


def slots(tokens):
    torch.manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K].int().contiguous()
    ids[-1, 1] = -1
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K), ids


def of_moe(**options):
    gate_up, down = weights()
    return lambda hidden, factors, ids: mk.fused_moe(hidden, gate_up, down, factors, ids, **options)


def of_int8():
    coded = mk.ExpertWeights.quantise(*weights(), "int8")
    return lambda hidden, factors, ids: mk.fused_experts(hidden, coded, factors, ids)


def of_router(num_groups, top_k_groups):
    bias = torch.randn(16, generator=torch.Generator().manual_seed(0))
    options = {"bias": bias, "num_groups": num_groups, "top_k_groups": top_k_groups, "routed_scale": 2.5}
    return lambda logits: mk.route(logits, 3, **options)


def of_decode(causal):
    def call(q, data, table, lengths, sink):
        cache = mk.LatentCache(data, 32)
        return mk.mla_decode(q, cache, table, lengths, softmax_scale=0.2, causal=causal, sink=sink)

    return call


def paged(n):
    table, lengths = torch.randperm(4 * n).view(n, 4).int(), torch.randint(0, 17, (n,), dtype=torch.int32)
    return torch.randn(n, 2, 3, 48), torch.randn(4 * n, 4, 48), table, lengths, torch.randn(3)


def prefill(q, k, v, k_rope, bounds):
    longest = {"max_seqlen_q": q.shape[0], "max_seqlen_k": q.shape[0]}
    return mk.mla_prefill(q, k, v, bounds, bounds, k_rope=k_rope, softmax_scale=0.2, **longest)


def packed(n):
    bounds = torch.tensor([0, n // 2, n], dtype=torch.int32)
    return torch.randn(n, 3, 48), torch.randn(n, 3, 32), torch.randn(n, 3, 16), torch.randn(n, 16), bounds


SIZE = {0: torch.export.Dim.DYNAMIC}
GPT_OSS = mk.Activation("gpt_oss", 0.7, interleaved=True)
CALLS = {  # (function, example of n, dynamic sizes, node)
    "experts": (of_moe(), slots, (SIZE,) * 3, "MoE"),
    "experts with a clamp": (of_moe(activation=mk.Activation("pre", 0.7)), slots, (SIZE,) * 3, "MoE"),
    "experts of gpt_oss": (of_moe(activation=GPT_OSS), slots, (SIZE,) * 3, "MoE"),
    "int8 experts": (of_int8(), slots, (SIZE,) * 3, "QMoE"),
    "router": (of_router(1, 1), lambda n: (torch.randn(n, 16),), (SIZE,), "MoEGroupRouter"),
    "router with groups": (of_router(4, 2), lambda n: (torch.randn(n, 16),), (SIZE,), "MoEGroupRouter"),
    "causal decode": (of_decode(True), paged, (SIZE,) * 4 + (None,), "Attention"),
    "decode": (of_decode(False), paged, (SIZE,) * 4 + (None,), "Attention"),
    "prefill": (prefill, packed, (SIZE,) * 4 + (None,), "Attention"),
}


class Calls(torch.nn.Module):
    def forward(self, given):
        return [function(*tensors) for (function, *_), tensors in zip(CALLS.values(), given)]


def examples(tokens):
    torch.manual_seed(tokens)
    return [example(tokens) for _, example, *_ in CALLS.values()]


def test_fused_operators_beside_the_ops():
    dynamic = ([sizes for _, _, sizes, _ in CALLS.values()],)
    model = mk.onnx.export(
        Calls(), (examples(TOKENS),), dynamic_shapes=dynamic, fused=("attention", "experts", "router")
    )
    assert model.model.opset_imports == {"": 23, "com.microsoft": 1}
    nodes = Counter(node.op_type for node in model.model.graph)
    wanted = Counter(node for *_, node in CALLS.values())
    assert {node: nodes[node] for node in wanted} == wanted
    runtime = session(model)
    for tokens in (TOKENS, *OTHERS, 1):
        given = examples(tokens)
        got = iter(run(runtime, [tensor for tensors in given for tensor in tensors]))
        for name, result in zip(CALLS, Calls()(given)):
            for want in result if isinstance(result, tuple) else (result,):
                if want.dtype.is_floating_point:
                    assert_close(next(got), want.double())
                else:
                    assert next(got).equal(want), name
        assert not list(got)


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
