"""What ``python -m mla_kernels build`` accepts, and which calls it makes."""

import json
from pathlib import Path

import pytest
import torch

import mla_kernels as mk
from mla_kernels import tiles
from mla_kernels.__main__ import main
from mla_kernels.autotune.models import MODELS
from mla_kernels.autotune.problems import OPERATIONS
from mla_kernels.bundle import BundleRefused, loading, manifest
from mla_kernels.bundling.build import Order
from mla_kernels.bundling.steps import CACHES, TRAINING, Limits, steps
from mla_kernels.launch import on_cpu

pytestmark = pytest.mark.quick

GOOD = {"--model": "deepseek-v3", "--target": "h100", "--tp": "8"}
ARGUMENTS = [part for pair in GOOD.items() for part in pair]
GOOD_MANIFEST = {
    "format": 1,
    "mla_kernels": "0.1.0",
    "target": {"vendor": "nvidia", "part": "H100", "chip": "sm_90", "backend": "cuda", "architecture": "90"},
    "toolchain": {"triton": "3.9.0", "settings": {}, "digest": "0"},
    "sources": {"route_kernel": {"hash": "0", "triton": "0"}},
    "kernels": [{"kernel": "route_kernel", "key": "A", "files": {"route_kernel.cubin": {"sha256": "0"}}}],
}
"""What is read again of a finished one."""


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
        ("--contexts", "4k", ("contexts: got '4k'", "integers from 1")),
        ("--pages", "²", ("pages: got '²'", "integers from 1")),
        ("--only", "route,nothing", ("only: got 'nothing'", "mla_decode")),
        ("--queries", "", ("queries: got ()",)),
        ("--jobs", "0", ("jobs: got 0",)),
    ],
)
def test_bad_input_names_what_is_accepted(option, value, words, tmp_path, capsys):
    arguments = [part for pair in (GOOD | {option: value}).items() for part in pair]
    with pytest.raises(SystemExit) as stopped:
        main(["build", *arguments, "-o", str(tmp_path / "new" / "bundle")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path, capsys):
    (tmp_path / "work.txt").write_text("mine")
    assert main(["build", *ARGUMENTS, "-o", str(tmp_path)]) == 1
    assert "is no bundle: name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["work.txt"]


@pytest.mark.parametrize(
    ("written", "beside"),
    [
        ({"name": "an extension of a browser", "manifest_version": 3}, ["page.html"]),
        ({"format": 1, "mla_kernels": "0.1.0", "kernels": []}, ["notes.txt"]),
        ([], []),
    ],
)
def test_a_manifest_does_not_make_a_folder_a_bundle(written, beside, tmp_path, capsys):
    for name, text in {manifest.NAME: json.dumps(written), **dict.fromkeys(beside, "mine")}.items():
        (tmp_path / name).write_text(text)
    assert main(["build", *ARGUMENTS, "-o", str(tmp_path)]) == 1
    assert "is no bundle: name another folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([manifest.NAME, *beside])


def test_what_build_writes_is_a_bundle_finished_or_not(tmp_path):
    for name in (manifest.FOLDER, manifest.FINISH):
        (tmp_path / name).touch()
    (tmp_path / manifest.NAME).write_text(json.dumps(GOOD_MANIFEST | {"format": 0}))
    assert manifest.is_bundle(tmp_path)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mla_kernels.bundling.build.INTERPRET", False)
    (tmp_path / "file").touch()
    assert main(["build", *ARGUMENTS, "-o", str(tmp_path / "file" / "bundle")]) == 1
    assert "file/bundle cannot be written: Not a directory" in capsys.readouterr().err
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    assert main(["build", *ARGUMENTS, "-o", str(tmp_path / "mount")]) == 1
    assert "mount is a mount point" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def spoilt(value, path=()):
    """Copies of a manifest, in each of which one part is gone or of another type; with the part's name."""
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        for other in (None, 3):
            yield ".".join(map(str, (*path, name))), {**value, name: other} if isinstance(value, dict) else [other]
        if isinstance(part, dict | list):
            for where, changed in spoilt(part, (*path, name)):
                yield where, {**value, name: changed} if isinstance(value, dict) else [changed]


def test_a_damaged_manifest_is_refused_whatever_it_lacks(tmp_path, monkeypatch, caplog):
    """By ``load`` with a BundleRefused, and so by the variable with a warning: importing the package goes on."""
    monkeypatch.setattr(loading, "HAS_TRITON", True)
    monkeypatch.setattr(loading, "INTERPRET", False)
    monkeypatch.setattr(loading, "_version_reasons", lambda found: [])
    cases = list(spoilt(GOOD_MANIFEST))
    assert len(cases) > 40
    for where, changed in cases:
        (tmp_path / manifest.NAME).write_text(json.dumps(changed))
        said = "has format" if where == "format" else f"damaged: {where} is|it is not finished"
        with pytest.raises(BundleRefused, match=said):
            loading.load(tmp_path)
    monkeypatch.setenv(loading.VARIABLE, str(tmp_path))
    assert loading.load_named() == [] and "is damaged" in caplog.text
    with pytest.raises(TypeError, match="path: got NoneType"):
        loading.load(None)


def test_a_bundle_prints_on_a_line():
    """At the prompt, where ``load`` is called: a manifest is megabytes."""
    shown = repr(loading.Bundle(Path("bundle"), GOOD_MANIFEST, {}, {}))
    assert shown == "Bundle(path=PosixPath('bundle'), found=Counter(), missed=Counter())"


def test_a_bundle_that_waits_for_cann_says_so(tmp_path):
    """Its sources have no hash of triton-ascend's yet, and its kernels no files."""
    open_one = {"kernel": "route_kernel", "key": None, "folder": "00", "stages": {}}
    toolchain = {"triton": "3.2.0", "settings": {}}
    found = GOOD_MANIFEST | {"kernels": [open_one], "sources": {"route_kernel": {"hash": "0"}}, "toolchain": toolchain}
    (tmp_path / manifest.NAME).write_text(json.dumps(found))
    with pytest.raises(BundleRefused, match=r"not finished: run its finish.py where CANN"):
        manifest.check_finished(tmp_path, manifest.read(tmp_path))


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
