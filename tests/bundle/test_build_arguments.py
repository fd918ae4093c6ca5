"""What ``python -m mla_kernels build`` accepts, and which calls it makes."""

import pytest
import torch

import mla_kernels as mk
from mla_kernels import tiles
from mla_kernels.__main__ import main
from mla_kernels.autotune.models import MODELS
from mla_kernels.autotune.problems import OPERATIONS
from mla_kernels.bundling.build import Order
from mla_kernels.bundling.steps import CACHES, TRAINING, Limits, steps
from mla_kernels.launch import on_cpu

pytestmark = pytest.mark.quick

GOOD = {"--model": "deepseek-v3", "--target": "h100", "--tp": "8"}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--model", "deepseek-v9", ("'deepseek-v9'", "deepseek-v3", "kimi-k2")),
        ("--target", "tpu", ("'tpu'", "h100", "mi300x", "910b", "sm_90")),
        ("--formats", "bf16,fp3", ("'fp3'", "bf16", "fp8_block", "int4")),
        ("--caches", "fp3", ("'fp3'", "plain", "fp8_v32")),
        ("--dtype", "fp8", ("'fp8'", "bf16, fp16, fp32")),
        ("--tp", "3", ("tp: got 3", "does not divide")),
        ("--tp", "0", ("tp: got 0",)),
        ("--batch", "0", ("batch: got (0,)", "integers from 1")),
        ("--contexts", "4k", ("'4k'", "integers from 1")),
        ("--queries", "", ("queries: got ()",)),
        ("--jobs", "0", ("jobs: got 0",)),
    ],
)
def test_bad_input_names_what_is_accepted(option, value, words, tmp_path, capsys):
    arguments = [part for pair in (GOOD | {option: value}).items() for part in pair]
    with pytest.raises(SystemExit) as stopped:
        main(["build", *arguments, "-o", str(tmp_path / "bundle")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path, capsys):
    (tmp_path / "work.txt").write_text("mine")
    arguments = [part for pair in GOOD.items() for part in pair]
    assert main(["build", *arguments, "-o", str(tmp_path)]) == 1
    assert "is no bundle: name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["work.txt"]


def test_formats_of_an_order():
    assert Order("deepseek-v3", "h100", 8).plain_formats == ("plain", "fp8_block")
    assert Order("deepseek-v3", "h100", 8, formats=("bf16", "int8")).plain_formats == ("plain", "int8")
    assert Order("deepseek-v3.2", "h100", 8).layouts == ("plain", "fp8_v32")


@pytest.mark.parametrize("name", MODELS)
def test_every_step_runs_on_meta(name):
    """Up to its launches, with every layout of cache that the model can have; and every operation is among them, but
    for those of training alone."""
    g, limits, called = MODELS[name].on(8), Limits(batch=1, tokens=2, queries=(1,), contexts=(8192,)), set()
    with on_cpu("torch", "h100"), tiles.silent(), tiles.record_launches() as launches, torch.no_grad():
        for step in steps(g, torch.bfloat16, limits, formats=("plain", *g.formats), caches=CACHES):
            launches.clear()
            step.call(step.sizes[0])
            assert launches, step.name
            called.add(step.name.partition(",")[0])
    assert called >= {name for name, one in OPERATIONS.items() if one.applies(g) and name not in TRAINING}


def test_counts_hold_each_class():
    counts = Limits(batch=40, tokens=300).counts()
    assert counts[:40] == list(range(1, 41)) and counts[-1] == 300
    assert {192, 193, 194} <= set(counts)


def test_record_launches_sees_what_a_launch_gets():
    with tiles.record_launches() as launches:
        mk.route(torch.empty(3, 8, device="meta"), 2)
        (one,) = launches
    assert one.kernel.name == "route_kernel" and one.args[0].shape == (3, 8) and one.tile and one.statics
    assert not tiles.recording()
