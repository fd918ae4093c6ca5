"""What a model launches: recorded from the ops themselves, and checked against what they launch on real tensors."""

from dataclasses import replace

import pytest
import torch

from mla_kernels import launch, tiles
from mla_kernels.autotune import online, problems
from mla_kernels.autotune.models import MODELS, Geometry
from mla_kernels.autotune.problems import OPERATIONS, Make
from mla_kernels.launch import KERNELS
from mla_kernels.targets.devices import DEVICES

SMALL = Geometry(
    "small", 128, 4, latent=128, rope=32, nope=32, value=32, q_rank=64, experts=8, top_k=2, inner=128, groups=1,
    top_groups=1, index_heads=16, index_width=64, index_top_k=16, streams=4, formats=problems.QUANTISED,
)  # fmt: skip
SMALL_V4 = replace(SMALL, latent=0, rope=0, scoring="sqrt_softplus")


def test_deepseek_v3_on_eight_devices():
    derived, refused = problems.of_model(MODELS["deepseek-v3"].on(8), DEVICES["h200"])
    assert refused == {}
    of = {}
    for one in derived:
        of.setdefault(one.problem.kernel.name, []).append(one.problem)
    gate_up = of["moe_gate_up_kernel"]
    assert [p.sizes["tokens"] for p in gate_up] == [4**i for i in range(8)]
    assert {(p.sizes["hidden"], p.sizes["intermediate"], p.sizes["experts"]) for p in gate_up} == {(7168, 256, 256)}
    assert {p.sizes["heads"] for p in of["mla_decode_kernel"]} == {16}
    assert of["mla_decode_kernel"][0].statics.items() >= {"LATENT": 512, "ROPE": 64, "PAGE_SIZE": 64}.items()
    assert of["route_kernel"][0].statics.items() >= {"EXPERTS": 256, "TOP_K": 8, "GROUPS": 8}.items()
    assert len({one.problem.key for one in derived}) == len(derived)


def test_every_known_model_has_problems_on_every_kind_of_device():
    for name, model in MODELS.items():
        for device in ("h100", "mi300x", "910b", "950pr"):
            assert problems.of_model(model.on(8), DEVICES[device])[1] == {}
            derived, refused = problems.of_model(model, DEVICES[device])
            assert refused == {} and {d.operation.name for d in derived} >= {"fused_moe", "route"}, (name, device)
            assert ("mla_decode" in {d.operation.name for d in derived}) == (model.latent > 0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_recording_is_what_real_tensors_look_up_and_results_are_the_reference_s(name):
    operation = OPERATIONS[name]
    size = {"tokens": 24, "batch": 2, "queries": 1, "causal": 1, "keys": 128}
    size |= {"sequences": 2, "ratio": 4, "width": 128, "codes": 1, "projection": 1}
    size = {key: size[key] for key in operation.sizes[0]}
    geometry = SMALL if operation.applies(SMALL) else SMALL_V4
    assert operation.applies(geometry)
    recorded = {d.problem.key for d in problems.of_model(geometry, DEVICES["h100"], torch.float32, (name,))[0]}
    small = replace(operation, sizes=(size,))
    with launch.on_cpu("npu-emulated", "ascend910b"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "CONTEXT", 128)
        patch.setitem(problems.OPERATIONS, "small", small)
        meta = [d.problem.key for d in problems.of_model(geometry, DEVICES["910b"], torch.float32, ("small",))[0]]
        call = operation.build(geometry, size, Make("cpu", torch.float32))
        with tiles.record() as recording:
            results = call.run()
    assert {p.key for p in recording} == set(meta) and recorded
    assert {p.kernel.name for p in recording} <= set(KERNELS)
    if call.expected is not None:
        assert online.error_of(call.seen(results), call.expected()) < 1e-4


def test_an_op_without_a_path_is_named_with_its_reason():
    narrow = replace(SMALL, inner=64)
    derived, refused = problems.of_model(narrow, DEVICES["h100"], torch.bfloat16)
    assert (
        set(refused) == {"fused_experts int4", "fused_experts mxfp4"}
        and "at least 128" in refused["fused_experts int4"]
    )
    assert "fused_experts fp8_block" in {one.operation.name for one in derived}


def test_choices_differ_within_a_row():
    chosen = Make("cpu", torch.float32).choices(50, 5, 7)
    assert chosen.dtype == torch.int32 and all(len(set(row.tolist())) == 5 for row in chosen)
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 7
