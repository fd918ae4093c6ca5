"""Bundles: built without their device, and then nothing is compiled over the stub driver; refused where they differ."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundle.building import HERE, build, child


@pytest.fixture(scope="module")
def over_stub(tmp_path_factory):
    """Runs a child over the stub driver with an empty cache of Triton's."""
    stub = tmp_path_factory.mktemp("stub")
    source = HERE.parent / "launch" / "stub_libcuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(stub / "libcuda.so.1"), str(source)], check=True)

    def run(*command, **environment):
        settings = {"TRITON_LIBCUDA_PATH": str(stub), "LD_LIBRARY_PATH": str(stub)}
        settings["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
        return child([sys.executable, "-m", *command], **settings, **environment)

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """(folder, manifest) of a few kernels for an H100."""
    folder = tmp_path_factory.mktemp("bundles") / "h100"
    return folder, build(folder, "h100", "route", "merge_states")


def test_the_manifest_says_what_was_compiled(bundle):
    folder, found = bundle
    assert found["target"]["part"] == "H100-SXM5-80GB" and found["target"]["vendor"] == "nvidia"
    assert {"triton", "digest", "backend", "torch", "python"} <= found["toolchain"].keys()
    assert {entry["kernel"] for entry in found["kernels"]} == {"route_kernel", "merge_states_kernel"}
    assert found["sources"].keys() == {"route_kernel", "merge_states_kernel"}
    for entry in found["kernels"]:
        assert entry["signature"] and entry["constants"] and entry["tile"] and entry["options"]["num_warps"]
        assert {Path(name).suffix for name in entry["files"]} == {".cubin", ".json"}
        for name, said in entry["files"].items():
            data = (folder / "kernels" / entry["key"] / name).read_bytes()
            assert said == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_a_loaded_bundle_compiles_nothing_and_says_what_it_lacks(bundle, over_stub):
    folder, found = bundle
    told = {"model": "deepseek-v3", "tp": 8, "device": "h100"}
    told["steps"] = {"route": [{"tokens": 1}, {"tokens": 4}], "merge_states": [{"tokens": t} for t in range(1, 5)]}
    told["outside"] = {"merge_states": [{"tokens": 4096}]}
    said, text = over_stub("tests.bundle.bundle_child", folder, json.dumps(told))
    assert said["compiled"] == [] and said["missed"] == {}
    assert sum(said["found"].values()) == len(found["kernels"])
    assert said["load seconds"] < 1
    assert said["outside"] == {"compiled": ["merge_states_kernel"], "missed": {"merge_states_kernel": 1}}
    assert "merge_states_kernel: bundle" in text and "no code for these arguments" in text


def test_refusals(bundle, over_stub):
    """Each names what differs; the JIT compiles then, as the child checks."""
    said, _ = over_stub("tests.bundle.refusals_child", bundle[0])
    for name, (expected, message) in said["refused"].items():
        assert expected in message, f"{name}: {message}"
    assert len(said["refused"]) == 14
    assert said["compiled after a bundle for another chip"] == ["route_kernel"]


def test_ascend_to_the_last_open_stage(tmp_path):
    (entry,) = build(tmp_path / "910b", "910b", "route")["kernels"]
    stages = {f"route_kernel.{stage}.mlir" for stage in ("ttadapter", "planned")}
    assert entry["key"] is None and set(entry["stages"]) == stages
    assert "hivm" in (tmp_path / "910b" / "kernels" / entry["folder"] / "route_kernel.planned.mlir").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["mi300x", "910c", "950pr"])
def test_other_targets(target, tmp_path):
    found = build(tmp_path / "bundle", target, "mla_decode", "route")
    assert {entry["kernel"] for entry in found["kernels"]} >= {"mla_decode_kernel", "route_kernel"}
    if target == "mi300x":
        assert {Path(name).suffix for name in found["kernels"][0]["files"]} == {".hsaco", ".json"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_deepseek_v3_on_eight(tmp_path, over_stub):
    """The whole model for one target: under 40 MB, loaded in under a second, and a step compiles nothing."""
    folder = tmp_path / "v3"
    build(folder, "h100", arguments=["--model", "deepseek-v3", "--tp", "8", "--formats", "bf16,fp8_block"])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 40e6
    tokens = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 48, 63, 64, 65, 100, 128, 129, 200, 255, 256, 320, 500, 512]
    prompts = [768, 1000, 1999, 4096, 4097, 8191, 8192]
    told = {"model": "deepseek-v3", "tp": 8, "device": "h100", "layers": [1, 3, 16, 37]}
    told["steps"] = {
        name: [{"tokens": count} for count in (*tokens, *prompts)]
        for name in (
            "fused_experts fp8_block", "fused_moe", "absorb_query", "expand_output", "norm_and_write", "write_latent",
            "route", "merge_states",
        )
    }  # fmt: skip
    told["steps"]["mla_decode"] = [
        {"batch": batch, "queries": queries, "context": context, "pool": pool}
        for batch in tokens
        for queries in (1, 2)
        for context in (4096, 4160, 40000)
        for pool in (0, 1 << 14, (1 << 14) + 64)
    ]
    told["steps"]["mla_prefill"] = [
        {"tokens": count, "sequences": sequences, "causal": 1}
        for sequences in (1, 2, 5)
        for count in (*tokens[3:], 1000, 1025)
    ]
    said, text = over_stub("tests.bundle.bundle_child", folder, json.dumps(told))
    assert said["compiled"] == [] and said["missed"] == {}, text
    assert said["load seconds"] < 1
