"""Peers: which files are found, and how they are brought, from wheels made here. Nothing is downloaded."""

import hashlib
import json
import struct
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from mla_kernels.device import get_peers, peers
from mla_kernels.device.peers import files, modules


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch):
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(path=[]))


def folder_with(path, *names, **manifest):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"no library")
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    return path


def test_found_in_the_folder(tmp_path):
    (library,) = files.NEEDS["FlashAttention-3"][1]
    folder = folder_with(tmp_path, library, files.NEEDS["vLLM"][1][0], versions={"fa3-fwd": "0.0.3"})
    versions, missing = files.find(folder)
    assert versions == {"FlashAttention-3": "fa3-fwd 0.0.3"}
    assert missing.keys() == files.NEEDS.keys() - versions.keys()
    assert "vllm/_flashmla_C.abi3.so is neither" in missing["FlashMLA"]


def test_found_among_installed_packages(tmp_path, monkeypatch):
    folder_with(tmp_path, *files.NEEDS["FlashMLA"][1])
    monkeypatch.setattr(files.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(files, "_installed", {"vllm": "0.33.0"}.get)
    versions, _ = files.find(None)
    assert versions == {"FlashMLA": "vllm 0.33.0 (written for 0.26.0)"}


def test_a_library_that_does_not_load_is_named(tmp_path):
    folder = folder_with(tmp_path, *files.NEEDS["FlashMLA"][1], versions={"vllm": "0.26.0"})
    found = peers.load(folder, device_name="NVIDIA H200")
    assert found.flashmla is None and found.versions == {} and found.missing.keys() == files.NEEDS.keys()
    assert found.missing["FlashMLA"].startswith("not loaded: OSError: ")


def test_over_the_stub_no_binary_is_loaded(tmp_path):
    folder = folder_with(tmp_path, *files.NEEDS["FlashMLA"][1], versions={"vllm": "0.26.0"})
    found = peers.load(folder, device_name="NVIDIA H200", stub=True)
    assert found.flashmla is None and "FlashMLA" not in found.missing


def test_modules_from_files(tmp_path):
    (tmp_path / "made_up" / "inner").mkdir(parents=True)
    (tmp_path / "made_up" / "inner" / "one.py").write_text("from made_up.other import answer\nvalue = answer() + 1\n")
    modules.stand_in("made_up.other", answer=lambda: 41)
    assert modules.from_file(tmp_path, "made_up/inner/one.py").value == 42


# ---------------------------------------------------------------------------------------------------------------------
# Wheels


def fat_binary(*parts: tuple[int, bytes]) -> bytes:
    """(capability, code) pairs as a library holds them, with bytes around."""
    entries = b"".join(
        struct.pack("<HHIQ", 2, 0, 64, len(code)) + bytes(12) + struct.pack("<I", capability) + bytes(32) + code
        for capability, code in parts
    )
    return b"head" + get_peers.FAT_BINARY + struct.pack("<HHQ", 1, 16, len(entries)) + entries + b"tail"


LIBRARY = fat_binary((80, b"eighty"), (90, b"ninety"), (100, b"hundred"))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """``wheel(names)``: a wheel of fa3-fwd with these files, pinned by its checksum; download() finds it."""

    def make(contents):
        path = tmp_path / "fa3_fwd-0.0.3-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        pinned = replace(get_peers.WHEELS["fa3-fwd"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(get_peers, "WHEELS", {"fa3-fwd": pinned})
        monkeypatch.setattr(get_peers, "download", lambda package, folder: path)
        return path

    return make


WHOLE = {
    "fa3_fwd/_C.abi3.so": LIBRARY, "fa3_fwd/other.py": "x", "fa3_fwd-0.0.3.dist-info/licenses/LICENSE": "theirs",
    "fa3_fwd-0.0.3.dist-info/RECORD": "r",
}  # fmt: skip


@pytest.mark.parametrize("capability, kept", [(None, LIBRARY), (90, None)])
def test_kept_of_a_wheel(capability, kept, wheel, tmp_path, capsys):
    wheel(WHOLE)
    folder = tmp_path / "peers"
    options = [str(folder)] + (["--capability", "9.0"] if capability else [])
    assert get_peers.main(options) == 0
    assert f"--peers {folder}" in capsys.readouterr().out
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"fa3_fwd/_C.abi3.so", "fa3_fwd-0.0.3.dist-info/licenses/LICENSE", files.MANIFEST}
    found = (folder / "fa3_fwd/_C.abi3.so").read_bytes()
    assert len(found) == len(LIBRARY) and b"ninety" in found and found.startswith(b"head") and found.endswith(b"tail")
    assert found == kept or (b"eighty" not in found and b"hundred" not in found)
    versions, _ = files.find(folder)
    assert versions == {"FlashAttention-3": "fa3-fwd 0.0.3"}


def test_another_wheel_is_refused(wheel, tmp_path, capsys):
    path = wheel(WHOLE)
    path.write_bytes(path.read_bytes() + b"more")
    assert get_peers.main([str(tmp_path / "peers")]) == 2
    assert "is pinned" in capsys.readouterr().err and not (tmp_path / "peers" / files.MANIFEST).exists()


def test_a_wheel_without_what_is_needed(wheel, tmp_path, capsys):
    wheel({"fa3_fwd/other.py": "x"})
    assert get_peers.main([str(tmp_path / "peers")]) == 2
    assert "has no file fa3_fwd" in capsys.readouterr().err


def test_a_name_that_leaves_the_folder(wheel, tmp_path, monkeypatch):
    path = wheel({"../escaped.so": "x"})
    monkeypatch.setitem(get_peers.WHEELS, "fa3-fwd", replace(get_peers.WHEELS["fa3-fwd"], kept=(r"\.\./escaped\.so",)))
    with pytest.raises(get_peers.Failed, match="lies outside"):
        get_peers.keep(path, "fa3-fwd", tmp_path / "peers", None)


def test_a_fat_binary_of_another_form_is_no_guess():
    broken = bytearray(LIBRARY)
    struct.pack_into("<H", broken, len(b"head") + 16, 7)
    with pytest.raises(get_peers.Failed, match="not understood"):
        get_peers.prune(broken, 90)
    plain = bytearray(b"no fat binary " + get_peers.FAT_BINARY)
    get_peers.prune(plain, 90)
    assert plain == b"no fat binary " + get_peers.FAT_BINARY


@pytest.mark.parametrize("content", [b"", b"a", bytes(200_000), b"x" + bytes(100_000) + b"y", bytes(65536) + b"z"])
def test_holes_read_as_zeros(content, tmp_path):
    get_peers.write_sparsely(tmp_path / "file", bytearray(content))
    assert (tmp_path / "file").read_bytes() == content


def test_pip_that_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        get_peers.subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=1, stderr="no net")
    )
    assert get_peers.main([str(tmp_path / "peers")]) == 2
    assert "pip download vllm==0.26.0: no net" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words", [([], "FOLDER"), (["x", "--capability", "hopper"], "as in 9.0"), ([__file__], "no folder")]
)
def test_refusals(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        get_peers.main(options)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_every_pinned_wheel_is_asked_for():
    assert get_peers.WHEELS.keys() == files.TESTED.keys() == {package for package, _ in files.NEEDS.values()}
    assert all(len(wheel.sha256) == 64 for wheel in get_peers.WHEELS.values())
    assert not list((Path(get_peers.__file__).parent).rglob("*.so"))
