"""The folder for a machine without network: the commit, the cache compiled over the stub driver, the archives."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mla_kernels.device import prepare, run_packed
from mla_kernels.device.cases import CASES
from mla_kernels.device.peers import files
from mla_kernels.targets import service
from tests.children import child_environment

ROOT = Path(__file__).parents[2]
IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")


@pytest.fixture
def repository(tmp_path):
    """What is packed of this tree, as a repository of its own."""
    tree = tmp_path / "tree"
    for name in prepare.CHECKOUT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tree / name)
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-C", tree, *IDENTITY, *arguments], check=True)
    return tree


def test_the_commit_as_a_package(repository, tmp_path):
    folder = tmp_path / "packed"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "stale.py").write_text("")
    (repository / "mla_kernels" / "uncommitted.py").write_text("")
    prepare.checkout(repository, folder)
    for name in ("reference/moe.py", "autotune/tables.py", "device/cases/decode.py", "device/run_packed.py"):
        assert (folder / "mla_kernels" / name).is_file()
    assert (folder / prepare.STUB).is_file() and (folder / "pyproject.toml").is_file()
    assert not (folder / "tests" / "stale.py").exists() and not (folder / "mla_kernels" / "uncommitted.py").exists()
    assert re.fullmatch(r"[0-9a-f]{12}", (folder / "COMMIT").read_text().strip())
    program = "from mla_kernels.device import cases, machine; print(machine.versions())"
    environment = child_environment(PYTHONPATH=str(folder))
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert f"(commit {(folder / 'COMMIT').read_text().strip()})" in child.stdout, child.stderr


def test_kernels_are_compiled_over_the_stub_driver(tmp_path):
    """Of two cases; what was compiled is kept, as reports of compilations are."""
    cache = service.cache_folder() / "stub_triton"
    environment = prepare.stub(ROOT / prepare.STUB, tmp_path / "stub") | {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": "0",
    }
    known = [case for case in CASES if case.name in ("route v3 t1", "write_latent t1")]
    log = tmp_path / "log"
    records = prepare.compile_cases(known, None, "h100", environment, log=log, workers=1)
    assert [record["case"] for record in records] == [case.name for case in known], log.read_text()
    for record in records:
        ours, invariant = record["contestants"]
        assert ours == {"name": "mla_kernels", "kind": "ours"} and record["problem"] == ""
        assert invariant == {"name": "batch_invariant=True", "kind": "variant"}
    assert list(cache.glob("*/route_kernel.cubin")) and list(cache.glob("*/write_latent_kernel.cubin"))


def test_archives_and_the_caches_paths(tmp_path):
    source = tmp_path / "cache"
    (source / "KEY").mkdir(parents=True)
    (source / "KEY" / "k.cubin").write_bytes(b"code")
    (source / "KEY" / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin"}}))
    prepare.pack(source, tmp_path / "cache.tar.xz")
    run_packed.unpack(tmp_path / "cache.tar.xz", tmp_path / "there")
    run_packed.move_cache(tmp_path / "there")
    group = json.loads((tmp_path / "there" / "KEY" / "__grp__k.json").read_text())
    assert Path(group["child_paths"]["k.cubin"]).read_bytes() == b"code"
    assert not list(tmp_path.glob("*.half"))


def test_sources_are_left_out_of_the_cache(tmp_path):
    (tmp_path / "KEY").mkdir()
    for name in ("k.source", "k.cubin", "k.json"):
        (tmp_path / "KEY" / name).write_text(name)
    names = {name: str(tmp_path / "KEY" / name) for name in ("k.source", "k.cubin", "k.json")}
    (tmp_path / "KEY" / "__grp__k.json").write_text(json.dumps({"child_paths": names}))
    prepare.without_sources(tmp_path)
    kept = json.loads((tmp_path / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert kept.keys() == {"k.cubin", "k.json"} and not (tmp_path / "KEY" / "k.source").exists()


def test_models_are_looked_at_before_anything_is_written(tmp_path, capsys):
    assert prepare.main([str(tmp_path / "made"), "--tune", "gpt-2"]) == 2
    error = capsys.readouterr().err
    assert "error: --tune gpt-2: " in error and "model 'gpt-2': neither a known name nor a config.json" in error
    assert not (tmp_path / "made").exists()


def test_the_whole_folder_runs(tmp_path, monkeypatch, capsys):
    """With nothing compiled and a package of two lines in place of the library: run.py hands its arguments on."""

    def checkout(root, folder):
        (folder / "mla_kernels").mkdir()
        (folder / "mla_kernels" / "__init__.py").write_text("")
        (folder / "mla_kernels" / "__main__.py").write_text(
            "import os, sys; print(sys.argv[1:], os.environ['TRITON_CACHE_DIR'], sorted(os.listdir(sys.argv[3])))"
        )
        (folder / "mla_kernels" / "autotune").mkdir()
        (folder / "mla_kernels" / "autotune" / "__main__.py").write_text(
            "import pathlib, sys; print(sys.argv[1:], pathlib.Path(sys.argv[-1]).read_text())"
        )

    def compile_cases(known, folder, tiles_of, environment, *, log):
        (Path(environment["TRITON_CACHE_DIR"]) / tiles_of).mkdir(parents=True)
        return [{"case": "a case", "contestants": [{"name": "x", "problem": "KeyError: y"}], "problem": "DIED"}]

    monkeypatch.setattr(prepare, "checkout", checkout)
    monkeypatch.setattr(prepare, "packages", lambda root, folder: None)
    monkeypatch.setattr(prepare, "stub", lambda source, folder: {})

    def shortlists(device, models, folder, environment, log):
        folder.mkdir(exist_ok=True)
        (folder / f"{device}.jsonl").write_text(f"shortlists for {' '.join(models)}")

    monkeypatch.setattr(prepare, "compile_cases", compile_cases)
    monkeypatch.setattr(prepare, "shortlists", shortlists)
    monkeypatch.setattr(prepare, "check_models", lambda device, models: None)
    peers, folder = tmp_path / "peers", tmp_path / "packed"
    peers.mkdir()
    (peers / files.MANIFEST).write_text("{}")
    assert prepare.main([str(folder), "--peers", str(peers), "--tiles-of", "h200"]) == 0
    text = capsys.readouterr().out
    assert "a case, x: KeyError: y" in text and "a case: DIED" in text
    assert re.search(r"0\.0 MiB in \d+ s; there: python packed/run\.py --seconds 240$", text, re.MULTILINE)
    command = [sys.executable, str(folder / "run.py"), "--only", "decode"]
    child = subprocess.run(command, env=child_environment(), capture_output=True, text=True, cwd=tmp_path)
    first, second = child.stdout.splitlines()
    assert first.endswith("the cache of kernels is valid here")
    assert second.startswith("['device', '--peers', ") and "'--only', 'decode']" in second and files.MANIFEST in second
    assert prepare.main([str(tmp_path / "two"), "--peers", str(peers), "--tiles-of", "h200", "--tune", "all"]) == 0
    assert "run.py --seconds 240 --tune 240" in capsys.readouterr().out
    command = [sys.executable, str(tmp_path / "two" / "run.py"), "--tune", "30", "--output", "out", "--only", "decode"]
    child = subprocess.run(command, env=child_environment(), capture_output=True, text=True, cwd=tmp_path)
    _, first, second = child.stdout.splitlines()
    assert "'--output', 'out', '--only', 'decode']" in first
    assert second.startswith(
        "['tune', '--model', 'all', '--budget', '30s', '--store', 'out/tiles.jsonl', '--shortlists'"
    )
    assert second.endswith("shortlists for all")
    for given in ("0", "soon"):
        command = [sys.executable, str(tmp_path / "two" / "run.py"), "--tune", given]
        child = subprocess.run(command, env=child_environment(), capture_output=True, text=True, cwd=tmp_path)
        assert child.returncode == 2 and f"--tune: '{given}': accepted are seconds, more than 0" in child.stderr
    monkeypatch.setattr(prepare, "MOST_BYTES", 10)
    assert prepare.main([str(folder / "again"), "--tiles-of", "h200"]) == 2
    assert "get_peers --capability 9.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["x", "--peers", "/nowhere"], "--peers /nowhere: no peers.json there"),
        (["x", "--tiles-of", "a100"], "invalid choice: 'a100'"),
        ([__file__], "is no folder"),
    ],
)
def test_refusals(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(options)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.mla_kernels, "__file__", str(tmp_path / "site" / "mla_kernels" / "__init__.py"))
    assert prepare.main([str(tmp_path / "folder")]) == 2
    assert "is no checkout of git" in capsys.readouterr().err
