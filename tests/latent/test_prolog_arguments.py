"""What the prolog's ops refuse, in which words, with nothing written; opcheck and torch.compile."""

from dataclasses import replace

import pytest
import torch

from mla_kernels import launch
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import ROPE_MODES
from tests.latent.problems import bits
from tests.latent.prolog_problems import OPS, Sizes, layer_weights, make, op_arguments, run

PLACES = [
    ("cos", lambda p: p["cos"][:, :-1], ValueError, r"cos: got stride|cos: got shape \(11, 7\)"),
    ("cos", lambda p: p["cos"].bfloat16(), TypeError, "cos: got dtype bfloat16, accepted: float32"),
    ("sin", lambda p: p["sin"][:-1], ValueError, r"sin: got shape \(10, 8\), \(11, 8\) is accepted"),
    ("sin", lambda p: p["sin"].to("meta"), ValueError, "sin: got a tensor on meta"),
    ("positions", lambda p: p["positions"][:-1], ValueError, r"positions: got shape \(4,\)"),
    ("positions", lambda p: p["positions"].float(), TypeError, "positions: got dtype float32, accepted: int32, int64"),
    ("positions", lambda p: p["positions"] * 0 - 1, ValueError, "positions: got values from -1 to -1.*0 to 10"),
    ("positions", lambda p: p["positions"] * 0 + 11, ValueError, "positions: got values from 11 to 11.*rows of cos"),
    ("rope", lambda p: "neox", ValueError, "rope: got 'neox', accepted"),
]
WRITTEN = [
    ("slot_mapping", lambda p: p["slot_mapping"][:3], ValueError, r"slot_mapping: got shape \(3,\)"),
    ("slot_mapping", lambda p: p["slot_mapping"] * 0 + 12, ValueError, "slot_mapping: got values from 12 to 12"),
    ("cache", lambda p: p["cache"].data, TypeError, "cache: got Tensor, a LatentCache"),
    ("eps", lambda p: -1.0, ValueError, "eps: got -1.0"),
]
CASES = {
    "absorb_query": [
        *PLACES,
        ("q", lambda p: p["q"][0], ValueError, "q: got 2 dimensions"),
        ("q", lambda p: p["q"].double(), TypeError, "q: got dtype float64"),
        ("q", lambda p: p["q"].transpose(1, 2).contiguous().transpose(1, 2), ValueError, "q: got stride 3 in the last"),
        ("q", lambda p: p["q"][..., :-1], ValueError, r"rope_dim \(q's last dimension less w_uk's rows\): got 15"),
        ("q", lambda p: p["q"].clone().requires_grad_(), NotImplementedError, "absorb_query .* q requires grad"),
        ("w_uk", lambda p: p["w_uk"].half(), TypeError, "w_uk: got dtype float16, accepted: float32"),
        ("w_uk", lambda p: p["w_uk"][:2], ValueError, r"w_uk: got shape \(2, 24, 32\), \(3, any, any\) is accepted"),
        ("w_uk", lambda p: p["w_uk"][..., :24], ValueError, "w_uk's latent dimension: got 24, powers of two"),
        ("w_uk", lambda p: p["w_uk"].clone().requires_grad_(), NotImplementedError, "w_uk requires grad"),
    ],
    "expand_output": [
        ("out", lambda p: p["out"][None], ValueError, "out: got 4 dimensions"),
        ("out", lambda p: p["out"].int(), TypeError, "out: got dtype int32"),
        ("out", lambda p: p["out"].clone().requires_grad_(), NotImplementedError, "out requires grad"),
        ("w_uv", lambda p: p["w_uv"][:, :, :16], ValueError, r"w_uv: got shape \(3, 20, 16\), \(3, any, 32\)"),
        ("w_uv", lambda p: p["w_uv"].bfloat16(), TypeError, "w_uv: got dtype bfloat16, accepted: float32"),
        ("w_uv", lambda p: p["w_uv"].to("meta"), ValueError, "w_uv: got a tensor on meta"),
        ("w_uv", lambda p: None, TypeError, "w_uv: got NoneType"),
    ],
    "norm_and_write": [
        *PLACES,
        *WRITTEN,
        ("q_a", lambda p: p["q_a"][:-1], ValueError, r"q_a: got shape \(4, 24\), \(5, any\) is accepted"),
        ("q_a", lambda p: p["q_a"].half(), TypeError, "q_a: got dtype float16"),
        ("q_a", lambda p: p["q_a"].clone().requires_grad_(), NotImplementedError, "q_a requires grad"),
        ("q_norm", lambda p: p["q_norm"][:-1], ValueError, r"q_norm: got shape \(23,\), \(24\) is accepted"),
        ("kv_a", lambda p: p["kv_a"][:, :-1], ValueError, r"kv_a: got shape \(5, 47\), \(any, 48\)"),
        ("kv_norm", lambda p: p["kv_norm"][:-1], ValueError, r"norm_weight: got shape \(31,\)"),
    ],
    "mla_prolog": [
        *PLACES,
        *WRITTEN,
        ("hidden", lambda p: p["hidden"][:, :-1], ValueError, r"hidden: got shape \(5, 39\), \(any, 40\) is accepted"),
        ("hidden", lambda p: p["hidden"].bfloat16(), TypeError, "hidden: got dtype bfloat16, accepted: float32"),
        ("hidden", lambda p: p["hidden"].clone().requires_grad_(), NotImplementedError, "hidden requires grad"),
        ("weights", lambda p: vars(p["weights"]), TypeError, "weights: got dict, PrologWeights is accepted"),
        ("weights", lambda p: layer_weights(Sizes(), torch.float16, "cpu"), TypeError, "weights: got dtype float16"),
        ("weights", lambda p: layer_weights(Sizes(rope=32), torch.float32, "cpu"), ValueError,
         "weights: got rope_dim 32, the cache's is 16"),
        ("weights", lambda p: layer_weights(Sizes(latent=64), torch.float32, "cpu"), ValueError,
         r"weights: got shape \(64,\), \(32\) is accepted"),
    ],
}  # fmt: skip
WEIGHTS = [
    ("w_uk", lambda w: w.w_uk[0], ValueError, "w_uk: got 2 dimensions"),
    ("w_uk", lambda w: w.w_uk[..., :24], ValueError, "w_uk's latent dimension: got 24"),
    ("kv_norm", lambda w: w.kv_norm[:-1], ValueError, r"kv_norm: got shape \(31,\), \(32\) is accepted"),
    ("kv_norm", lambda w: w.kv_norm.half(), TypeError, "kv_norm: got dtype float16"),
    ("q_norm", lambda w: w.q_norm[:-1], ValueError, r"rope_dim .*: got 17"),
    ("q_up", lambda w: w.q_up[:-1], ValueError, r"q_up: got shape \(119, 24\), \(120, 24\) is accepted"),
    ("q_up", lambda w: w.q_up.to("meta"), ValueError, "q_up: got a tensor on meta"),
    ("down", lambda w: w.down.double(), TypeError, "down: got dtype float64"),
    ("down", lambda w: w.down.tensor_split((23,)), ValueError, r"down: got \(23, 40\), \(49, 40\), .* q_lora 24"),
    ("down", lambda w: w.down.tensor_split(3), ValueError, "down: got .* the pair"),
    ("down_bias", lambda w: w.q_norm, ValueError, r"down_bias: got shape \(24,\), \(72\) is accepted"),
    ("down_bias", lambda w: (w.q_norm, w.kv_norm), ValueError, "down_bias: got 2 tensors, 1 are accepted"),
]


@pytest.mark.parametrize(
    ("op", "name", "change", "error", "words"),
    [pytest.param(op, *case, id=f"{op}-{i}-{case[0]}") for op, cases in CASES.items() for i, case in enumerate(cases)],
)
def test_refused_and_nothing_written(op, name, change, error, words):
    arguments = make(op)
    before = arguments["cache"].data.clone() if "cache" in arguments else None
    with pytest.raises(error, match=words):
        run(op, arguments | {name: change(arguments)})
    if before is not None:
        assert torch.equal(bits(arguments["cache"].data), bits(before))


@pytest.mark.parametrize(("name", "change", "error", "words"), WEIGHTS)
def test_weights_that_do_not_go_together(name, change, error, words):
    weights = layer_weights(Sizes(), torch.float32, "cpu")
    with pytest.raises(error, match=words):
        replace(weights, **{name: change(weights)})


@pytest.mark.parametrize("name", ["down", "kv_norm", "q_up", "w_uk", "q_norm"])
def test_weights_that_want_a_gradient(name):
    arguments = make("mla_prolog")
    weights = arguments["weights"]
    weights = replace(weights, **{name: getattr(weights, name).clone().requires_grad_()})
    with pytest.raises(NotImplementedError, match=rf"mla_prolog has no backward and weights.{name}.* requires grad"):
        run("mla_prolog", arguments | {"weights": weights})
    with torch.no_grad():
        run("mla_prolog", arguments | {"weights": weights})


def test_a_key_without_rope_part_is_refused():
    arguments = make("norm_and_write")
    cache = LatentCache(torch.zeros(3, 4, 32), 32)
    with pytest.raises(ValueError, match="rope_dim: got 0"):
        run("norm_and_write", arguments | {"cache": cache, "kv_a": arguments["kv_a"][:, :32]})


def test_widths_that_a_chip_cannot_hold():
    arguments = make("absorb_query", Sizes(rope=512))
    with launch.on_cpu("npu-emulated"), pytest.raises(NotImplementedError, match=r"rope_dim 512 needs about .* of UB"):
        run("absorb_query", arguments)
    arguments = make("norm_and_write", Sizes(rope=256, latent=512))
    before = arguments["cache"].data.clone()
    with launch.on_cpu("npu-emulated"), pytest.raises(NotImplementedError, match=r"rope_dim 256 needs about .* of UB"):
        run("norm_and_write", arguments)
    assert torch.equal(bits(arguments["cache"].data), bits(before))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rope", ROPE_MODES)
def test_opcheck(op, rope):
    arguments = make(op, rope=rope)
    if "cache" in arguments:
        arguments["cache"].data.zero_()
    with launch.on_cpu("torch"):
        torch.library.opcheck(getattr(torch.ops.mla_kernels, op).default, op_arguments(op, arguments))


@pytest.mark.parametrize("options", [{"pair": True, "bias": True}, {"sizes": Sizes(q_lora=0)}], ids=str)
def test_opcheck_of_other_weights(options):
    arguments = make("mla_prolog", **options)
    arguments["cache"].data.zero_()
    with launch.on_cpu("torch"):
        torch.library.opcheck(torch.ops.mla_kernels.mla_prolog.default, op_arguments("mla_prolog", arguments))


@pytest.mark.parametrize("op", OPS)
def test_torch_compile_takes_the_public_function_whole(op):
    arguments = make(op, dtype=torch.bfloat16)
    written = "cache" in arguments
    data = arguments.pop("cache").data.zero_() if written else torch.zeros(1)

    def step(data, arguments):
        if written:
            arguments = {**arguments, "cache": LatentCache(data, 32)}
        return OPS[op](**arguments)

    with launch.on_cpu("torch"):
        compiled = data.clone()
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, arguments)
        want = step(data, arguments)
    assert torch.equal(compiled, data)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want))):
        assert torch.equal(one, other)
