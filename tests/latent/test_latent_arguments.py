"""What write_latent and compress_latent refuse, in which words, with nothing written; opcheck and torch.compile."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.prolog import NORM_AND_WRITE
from mla_kernels.latent.write import ROPE_MODES, WRITE_LATENT, model_statics
from mla_kernels.targets.chips import CHIPS
from tests.latent.problems import OPS, QUANTISED, bits, make

SHARED = [
    ("norm_weight", lambda p: p["norm_weight"][:-1], ValueError, r"norm_weight: got shape \(31,\)"),
    ("norm_weight", lambda p: p["norm_weight"].half(), TypeError, "norm_weight: got dtype float16"),
    ("norm_weight", lambda p: p["norm_weight"].to("meta"), ValueError, "norm_weight: got a tensor on meta"),
    ("norm_weight", lambda p: p["norm_weight"].repeat(2)[::2], ValueError, "norm_weight: got stride 2"),
    ("norm_weight", lambda p: [1.0] * 32, TypeError, "norm_weight: got list"),
    ("cos", lambda p: p["cos"].repeat(1, 2), ValueError, r"cos: got shape \(11, 16\)"),
    ("cos", lambda p: p["cos"].bfloat16(), TypeError, "cos: got dtype bfloat16, accepted: float32"),
    ("cos", lambda p: p["cos"].to("meta"), ValueError, "cos: got a tensor on meta"),
    ("cos", lambda p: p["cos"].T.contiguous().T, ValueError, "cos: got stride 11"),
    ("sin", lambda p: p["sin"][:-1], ValueError, r"sin: got shape \(10, 8\), \(11, 8\) is accepted"),
    ("sin", lambda p: p["sin"].double(), TypeError, "sin: got dtype float64"),
    ("positions", lambda p: p["positions"][:-1], ValueError, r"positions: got shape \(4,\)"),
    ("positions", lambda p: p["positions"].float(), TypeError, "positions: got dtype float32, accepted: int32, int64"),
    ("positions", lambda p: p["positions"][None], ValueError, r"positions: got shape \(1, 5\)"),
    ("positions", lambda p: p["positions"] * 0 - 1, ValueError, "positions: got values from -1 to -1.*0 to 10"),
    ("positions", lambda p: p["positions"] * 0 + 11, ValueError, "positions: got values from 11 to 11.*rows of cos"),
    ("slot_mapping", lambda p: p["slot_mapping"][:3], ValueError, r"slot_mapping: got shape \(3,\)"),
    ("slot_mapping", lambda p: p["slot_mapping"].short(), TypeError, "slot_mapping: got dtype int16"),
    ("slot_mapping", lambda p: p["slot_mapping"].to("meta"), ValueError, "slot_mapping: got a tensor on meta"),
    ("slot_mapping", lambda p: p["slot_mapping"].repeat_interleave(2)[::2], ValueError, "slot_mapping: got stride 2"),
    ("slot_mapping", lambda p: p["slot_mapping"].clone().index_fill_(0, torch.tensor([3]), -2), ValueError,
     "slot_mapping: got values from -2 .* accepted: -1 to 11 .*the cache has 12 slots"),
    ("slot_mapping", lambda p: p["slot_mapping"].clone().index_fill_(0, torch.tensor([4]), 12), ValueError,
     "slot_mapping: got values from . to 12, accepted: -1 to 11"),
    ("cache", lambda p: torch.zeros(3, 4, 48), TypeError, "cache: got Tensor, a LatentCache"),
    ("rope", lambda p: "neox", ValueError, "rope: got 'neox', accepted: 'interleaved_to_half', 'interleaved', 'half'"),
    ("eps", lambda p: -1.0, ValueError, "eps: got -1.0"),
    ("eps", lambda p: float("nan"), ValueError, "eps: got nan"),
]  # fmt: skip
OWN = {
    "write_latent": [
        ("kv_a", lambda p: p["kv_a"][0], ValueError, r"kv_a: got shape \(48,\), \(any, 48\)"),
        ("kv_a", lambda p: p["kv_a"][:, :-1], ValueError, r"kv_a: got shape \(5, 47\), \(any, 48\)"),
        ("kv_a", lambda p: p["kv_a"].bfloat16(), TypeError, "kv_a: got dtype bfloat16, accepted: float32"),
        ("kv_a", lambda p: p["kv_a"].T.contiguous().T, ValueError, "kv_a: got stride 5 in the last dimension"),
        ("kv_a", lambda p: p["kv_a"].clone().requires_grad_(), NotImplementedError, "kv_a requires grad"),
    ],
    "compress_latent": [
        ("hidden", lambda p: p["hidden"][None], ValueError, "hidden: got 3 dimensions"),
        ("hidden", lambda p: p["hidden"].half(), TypeError, "hidden: got dtype float16"),
        ("hidden", lambda p: p["hidden"].T.contiguous().T, ValueError, "hidden: got stride 5"),
        ("hidden", lambda p: p["hidden"][:, :-1].contiguous(), ValueError, r"weight: got shape \(48, 48\), \(48, 47\)"),
        ("weight", lambda p: p["weight"][:-1], ValueError, r"weight: got shape \(47, 48\)"),
        ("weight", lambda p: p["weight"].T, ValueError, "weight: got stride 48"),
        ("weight", lambda p: p["weight"].to("meta"), ValueError, "weight: got a tensor on meta"),
        ("weight", lambda p: p["weight"].clone().requires_grad_(), NotImplementedError, "weight requires grad"),
    ],
}


@pytest.mark.parametrize(
    ("op", "name", "change", "error", "words"),
    [pytest.param(op, *case, id=f"{op}-{i}-{case[0]}") for op in OPS for i, case in enumerate(SHARED + OWN[op])],
)
def test_refused_and_nothing_written(op, name, change, error, words):
    problem = make(op)
    before = problem.cache.data.clone()
    with pytest.raises(error, match=words):
        problem.run(**{name: change(problem.arguments)})
    assert torch.equal(bits(problem.cache.data), bits(before))


@pytest.mark.parametrize("op", OPS)
def test_widths_that_a_chip_cannot_hold(op):
    problem = make(op, latent_dim=512, rope_dim=256)
    before = problem.cache.data.clone()
    with launch.on_cpu("npu-emulated"), pytest.raises(NotImplementedError, match=r"rope_dim 256 needs about .* of UB"):
        problem.run()
    assert torch.equal(bits(problem.cache.data), bits(before))


@pytest.mark.parametrize("layout", QUANTISED)
@pytest.mark.parametrize(
    ("op", "name", "words"),
    [
        ("write_latent", "kv_a", "kv_a: got dtype float16, accepted: bfloat16"),
        ("write_latent", "norm_weight", "norm_weight: got dtype float16, accepted: bfloat16"),
        ("compress_latent", "hidden", "hidden: got dtype float16, accepted: bfloat16"),
        ("compress_latent", "weight", "weight: got dtype float16, accepted: bfloat16"),
    ],
)
def test_quantised_caches_take_bfloat16(layout, op, name, words):
    problem = make(op, layout=layout)
    before = problem.cache.data.clone()
    with pytest.raises(TypeError, match=words):
        problem.run(**{name: problem.arguments[name].half()})
    assert torch.equal(problem.cache.data, before)


@pytest.mark.parametrize("kernel", [WRITE_LATENT, NORM_AND_WRITE])
def test_a_rule_refuses_a_quantised_cache_of_another_dtype(kernel):
    statics = {"Q": 1536, "BLOCK_Q": 2048, **model_statics(512, 64, "half", "int8")}
    with pytest.raises(NotImplementedError, match="layout int8 holds bf16 keys, got fp32"):
        kernel.rule(CHIPS["sm_90"], "fp32", statics, {"tokens": 4})


def test_gradients_are_lost_only_where_asked():
    problem = make("write_latent")
    with torch.no_grad():
        problem.run(kv_a=problem.arguments["kv_a"].clone().requires_grad_())


def op_arguments(problem):
    names = [a.name for a in getattr(torch.ops.mla_kernels, problem.op).default._schema.arguments]
    cache = problem.cache
    own = {"cache": cache.data, "layout": cache.layout.value, "latent_dim": cache.latent_dim}
    return tuple(
        {**problem.arguments, **own, "rope": problem.rope, "eps": 1e-6, "batch_invariant": False}[name]
        for name in names
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rope", "layout"), [*((rope, None) for rope in ROPE_MODES), ("half", "fp8_v32")])
def test_opcheck(op, rope, layout):
    problem = make(op, rope=rope, layout=layout)
    problem.cache.data.zero_()
    with launch.on_cpu("torch"):
        torch.library.opcheck(getattr(torch.ops.mla_kernels, op).default, op_arguments(problem))


@pytest.mark.parametrize("op", OPS)
def test_torch_compile_takes_the_public_function_whole(op):
    problem = make(op)
    arguments = {**problem.arguments, "rope": problem.rope}
    data = problem.cache.data.zero_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(data, arguments):
        OPS[op](cache=LatentCache(data, 32), **arguments)
        return data.sum()

    with launch.on_cpu("torch"):
        compiled = data.clone()
        total = step(compiled, arguments)
        problem.run()
    assert torch.equal(compiled, data)
    assert torch.equal(total, data.sum())
