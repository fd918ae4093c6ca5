"""python finish.py [BUNDLE]: the last step of a bundle for Ascend, where CANN is installed.

It needs CANN's compiler (``bishengir-compile`` and ``hivmc`` on PATH, or TRITON_NPU_COMPILER_PATH), torch with
torch_npu, triton-ascend and mla_kernels in the versions of the manifest, and the device. triton-ascend compiles each
kernel as its JIT would, but for the stages that the bundle holds, whose result is taken from there. The machine code
and triton-ascend's own description of it are written under the key that triton-ascend looks it up by, so that
``mla_kernels.bundle.load`` gives it to triton-ascend's own runtime.

A kernel that is finished is not compiled again.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from mla_kernels import launch
from mla_kernels.bundle import manifest
from mla_kernels.bundle.loading import family
from mla_kernels.bundle.manifest import BundleRefused
from mla_kernels.language import triton


def finish(folder: Path, say=print) -> dict:
    """Finish the kernels of a bundle; returns the manifest, which is written too.

    Raises:
        BundleRefused: it is for another driver or chip, of another version or source, or damaged.
    """
    found = manifest.read(folder)
    if found["target"]["vendor"] != "ascend" or family() != "ascend":
        raise BundleRefused(folder, [f"it is for {found['target']['vendor']}, finish.py runs where triton-ascend is"])
    target = triton.runtime.driver.active.get_current_target()
    reasons = manifest.ascend_reasons(found, target)
    for name, source in found["sources"].items():
        if name not in launch.KERNELS or launch.KERNELS[name].source_hash != source["hash"]:
            reasons.append(f"the source differs of {name}")
    if reasons:
        raise BundleRefused(folder, reasons)
    began, open_ones = time.monotonic(), [entry for entry in found["kernels"] if entry["key"] is None]
    with tempfile.TemporaryDirectory(prefix="mla_kernels_finish_") as cache, _environment("TRITON_CACHE_DIR", cache):
        for done, entry in enumerate(open_ones, 1):
            entry["key"], entry["files"] = _finish(entry, folder, target)
            manifest.write(folder, found)
            say(f"{done} of {len(open_ones)}: {entry['kernel']}")
    found["target"]["architecture"] = str(target.arch)
    found["toolchain"] |= {"digest": manifest.compiler_digest(), "settings": manifest.compiler_settings()}
    for name, source in found["sources"].items():
        source["triton"] = manifest.triton_source(launch.KERNELS[name])
    manifest.write(folder, found)
    say(f"{folder}: {len(open_ones)} kernels finished in {time.monotonic() - began:.0f} s")
    return found


def _finish(entry: dict, folder: Path, target) -> tuple[str, dict]:
    """(key, files) of one kernel."""
    from triton.backends.ascend.compiler import AscendAttrsDescriptor
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.cache import get_cache_manager

    name = f"{entry['kernel']}.ttadapter.mlir"
    text = (folder / manifest.FOLDER / entry["folder"] / name).read_bytes()
    if manifest.digest(text) != entry["stages"][name]["sha256"]:
        raise BundleRefused(folder, [f"{entry['folder']}/{name} is damaged: its hash is not the manifest's"])
    attributes = {"arg_properties": entry["attributes"], "cls": "AscendAttrsDescriptor"}
    source = ASTSource(
        launch.KERNELS[entry["kernel"]].fn, entry["signature"], entry["constants"],
        AscendAttrsDescriptor.from_dict(attributes),
    )  # fmt: skip
    backend = make_backend(target)
    stages = type(backend).add_stages.__globals__  # Triton loads its backends' files itself, beside the import of them
    before, stages["ttir_to_linalg"] = stages["ttir_to_linalg"], lambda *arguments, **options: text.decode()
    try:
        options = backend.parse_options({"debug": False})
        compiled = triton.compile(source, target=target, options=options.__dict__)
    finally:
        stages["ttir_to_linalg"] = before
    files, kept = {}, Path(get_cache_manager(compiled.hash).cache_dir)
    place = folder / manifest.FOLDER / kept.name
    place.mkdir(exist_ok=True)
    for suffix in (".npubin", ".json"):
        name = f"{source.name[:150]}{suffix}"  # as triton-ascend cuts it
        data = (kept / name).read_bytes()
        (place / name).write_bytes(data)
        files[name] = {"sha256": manifest.digest(data), "bytes": len(data)}
    return kept.name, files


@contextlib.contextmanager
def _environment(name: str, value: str):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent).resolve()
    try:
        finish(folder)
    except BundleRefused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
