"""``python -m mla_kernels.device.get_peers FOLDER``: the other libraries that the device benchmark times.

Pinned wheels of vllm, sglang and fa3-fwd are downloaded with pip (360 MB) and held against their checksums; what the
benchmark loads is kept in FOLDER under its name in the wheel. It stays under its owners' licences, whose files are kept
too. The binaries are for Linux on x86-64, torch 2.11 with CUDA 13, Python 3.12; what does not load elsewhere is named
by the benchmark, and the others are timed.
"""

import argparse
import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mla_kernels.device.peers.files import MANIFEST, TESTED

PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_24_x86_64")
PYTHON = "3.12"


@dataclass(frozen=True)
class Wheel:
    """A package's SHA-256 and what of it is kept: regular expressions of whole names in the wheel."""

    sha256: str
    kept: tuple[str, ...]


MOE = r"vllm/model_executor/layers/fused_moe/"
OPS = r"sglang/kernels/ops/"
TILES = r"sglang/srt/layers/moe/moe_runner/triton_utils/configs/triton_\w+/"
WHEELS = {
    "vllm": Wheel(
        "adb1e4c9b46d0dfdb094121ae5aad670a42412dd813ed4e5db069ed6a15006de",
        (
            r"vllm/(_flashmla_C|_C_stable_libtorch|_moe_C_stable_libtorch)\.abi3\.so",
            r"vllm/third_party/deep_gemm/(?!_C\.cpython-(?!312-)).*",
            MOE + r"deep_gemm_utils\.py",
            MOE + r"configs/E=(32|64|256),.*NVIDIA_(H100_80GB|H200).*",
        ),
    ),
    "sglang": Wheel(
        "ffaced7e91c3536c63077b16b08210b5c1a2f362418e9841a8767d5e019cf08a",
        (
            OPS + r"attention/(score_mod|decode_attention)\.py",
            OPS + r"moe/(fused_moe_triton_kernels|moe_align_small_numel)\.py",
            TILES + r"E=(32|64|65|256|257|264),.*NVIDIA_(H100|H200|H20[,.]).*",
        ),
    ),
    "fa3-fwd": Wheel(
        "44d26c6cfc69dde5a0f9c6bebbccbb96ed20e97bc8b9ddda638b0bf62e91b93d", (r"fa3_fwd/_C\.abi3\.so",)
    ),
}  # fmt: skip
LICENCES = r"[^/]+\.dist-info/(METADATA|.*(LICEN[CS]E|NOTICE|COPYING).*)"
FAT_BINARY = struct.pack("<I", 0xBA55ED50)


class Failed(RuntimeError):
    """What could not be had; the message says why."""


def download(package: str, folder: Path) -> Path:
    """The wheel of the pinned version."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    requirement = f"{package}=={TESTED[package]}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:",
        "--implementation", "cp", "--python-version", PYTHON, *platforms, "--dest", str(folder), requirement,
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    if found.returncode or len(wheels) != 1:
        raise Failed(f"pip download {requirement}: {found.stderr.strip()[-500:]}")
    return wheels[0]


def keep(wheel: Path, package: str, folder: Path, capability: int | None) -> int:
    """Write what is kept of a wheel under ``folder``: how many files. Failed where its checksum or content differs."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
    if found != WHEELS[package].sha256:
        raise Failed(f"{wheel.name}: SHA-256 {found}, {WHEELS[package].sha256} is pinned")
    count = 0
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for pattern in (*WHEELS[package].kept, LICENCES):
            kept = [name for name in names if re.fullmatch(pattern, name)]
            if not kept and pattern != LICENCES:
                raise Failed(f"{wheel.name} has no file {pattern}")
            for name in kept:
                path = folder / name
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise Failed(f"{wheel.name}: {name} lies outside of the folder")
                content = bytearray(archive.read(name))
                if capability is not None and name.endswith(".so"):
                    prune(content, capability)
                write_sparsely(path, content)
                count += 1
    return count


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def prune(library: bytearray, capability: int) -> None:
    """Zero the machine code and PTX of other GPUs in place: offsets stay, and zeros take no room.

    A fat binary: magic, version 1, header of 16 bytes, size of what follows; then entries of kind (1 PTX, 2 machine
    code), header size, payload size and, at byte 28, the compute capability.
    """
    at = 0
    while (at := library.find(FAT_BINARY, at)) >= 0:
        if at + 16 > len(library):
            return
        _, version, header, size = struct.unpack_from("<IHHQ", library, at)
        if version != 1 or header != 16 or at + header + size > len(library):
            at += 4
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
            if kind not in (1, 2) or not 32 <= header <= 4096 or entry + header + size > end:
                raise Failed(f"a fat binary's entry at byte {entry} is not understood")
            if struct.unpack_from("<I", library, entry + 28)[0] != capability:
                library[entry + header : entry + header + size] = bytes(size)
            entry += header + size
        at = end


def write_sparsely(path: Path, content: bytearray, block: int = 1 << 16) -> None:
    """Write a file; blocks of zeros become holes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = bytes(block)
    with path.open("wb") as file:
        for start in range(0, len(content), block):
            part = content[start : start + block]
            if part != empty[: len(part)]:
                file.seek(start)
                file.write(part)
        file.truncate(len(content))


def get(folder: Path, capability: int | None = None, say=print) -> None:
    """Fill ``folder``; its manifest is written last, so a folder that has one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in WHEELS:
        say(f"{package} {TESTED[package]}: downloading")
        with tempfile.TemporaryDirectory() as unpacked:
            count = keep(download(package, Path(unpacked)), package, folder, capability)
        say(f"{package} {TESTED[package]}: {count} files kept")
    manifest = {"versions": TESTED, "capability": capability, "sha256": {n: w.sha256 for n, w in WHEELS.items()}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def capability(text: str) -> int:
    """90 of "9.0"."""
    if not re.fullmatch(r"\d+\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a capability as in 9.0")
    return int(text.replace(".", ""))


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m mla_kernels.device.get_peers", description=__doc__.splitlines()[0])
    made.add_argument("folder", type=Path, metavar="FOLDER")
    made.add_argument("--capability", type=capability, metavar="X.Y", help="drop other GPUs' code, for a small folder")
    chosen = made.parse_args(arguments)
    if chosen.folder.exists() and not chosen.folder.is_dir():
        made.error(f"{chosen.folder} is no folder")
    try:
        get(chosen.folder, chosen.capability)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"python -m mla_kernels device --peers {chosen.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
