"""The manifest of a bundle: what its kernels were compiled from, for what, by what."""

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mla_kernels.language import triton

NAME = "manifest.json"
FOLDER = "kernels"
FINISH = "finish.py"
"""Beside the manifest of a bundle for Ascend."""
FORMAT = 1
"""Number of this form of manifest; another is refused."""
ANY = "*"
FORM = {
    "mla_kernels": str,
    "target": {"vendor": str, "part": str, "chip": str, "backend": str, "architecture": str},
    "toolchain": {"triton": str, "settings": dict},
    "sources": {ANY: {"hash": str}},
    "kernels": [{"kernel": str}],
}
"""What every manifest has of what is read again: names, :data:`ANY` for all of them, and types."""
FINISHED = {
    "toolchain": {"digest": str},
    "sources": {ANY: {"triton": str}},
    "kernels": [{"key": str, "files": {ANY: {"sha256": str}}}],
}
"""What it has besides once nothing is left for ``finish.py`` to do."""


class BundleRefused(ValueError):
    """A bundle that cannot be used here. ``reasons`` says what differs, one a string."""

    def __init__(self, path: Path, reasons: list[str]):
        self.path, self.reasons = path, reasons
        super().__init__(f"bundle {path} is refused: {'; '.join(reasons)}. Its kernels are compiled here at first use")


def package_version() -> str:
    """The installed version of this package; "" where it is not installed."""
    try:
        return version("mla_kernels")
    except PackageNotFoundError:
        return ""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compiler_digest() -> str:
    """Of Triton's compiler, byte for byte; takes most of a second, once a process (a launch needs it anyhow)."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # triton-ascend
        from triton.compiler.compiler import triton_key

    return digest(triton_key().encode())


def compiler_settings() -> dict[str, str]:
    """Environment variables that change what Triton compiles, as far as they are set."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return dict(sorted(get_cache_invalidating_env_vars().items()))


def triton_source(kernel) -> str:
    """Triton's hash of a declared kernel's source, its helpers and the line where it stands."""
    return digest(kernel.jit.cache_key.encode())


def triton_version() -> str:
    return triton.__version__


def ascend_reasons(found: dict, target) -> list[str]:
    """Why a bundle for Ascend is not for the NPU that triton-ascend calls ``target``."""
    kinds = {"Ascend910_93": "ascend910c", "Ascend910B": "ascend910b", "Ascend950": "ascend950"}
    chip = next((chip for prefix, chip in kinds.items() if str(target.arch).startswith(prefix)), None)
    wanted = found["target"]
    if target.backend == "npu" and chip == wanted["chip"]:
        return []
    return [f"it is for {wanted['part']} ({wanted['chip']}), this device is {target.backend} {target.arch}"]


def write(folder: Path, manifest: dict) -> None:
    half = folder / f".{NAME}.{os.getpid()}"
    half.write_text(json.dumps(manifest, indent=1) + "\n")
    half.replace(folder / NAME)


def is_bundle(folder: Path) -> bool:
    """Whether ``python -m mla_kernels build`` of any version wrote this folder, and nothing else stands in it."""
    try:
        found = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return False
    ours = isinstance(found, dict) and found.keys() >= {"format", "mla_kernels", "kernels"}
    return ours and {path.name for path in folder.iterdir()} <= {NAME, FOLDER, FINISH}


def read(folder: Path) -> dict:
    """The manifest of a bundle, finished or not. BundleRefused where there is none, or none of this form."""
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise BundleRefused(folder, [f"{NAME} cannot be read ({error.strerror})"]) from error
    except ValueError as error:
        raise BundleRefused(folder, [f"{NAME} is no JSON ({error})"]) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise BundleRefused(folder, [f"{NAME} has format {found!r}, {FORMAT} is accepted"])
    if reasons := _misses(manifest, FORM, ""):
        raise BundleRefused(folder, [f"{NAME} is damaged: {'; '.join(reasons)}"])
    return manifest


def check_finished(folder: Path, manifest: dict) -> None:
    """BundleRefused where a kernel waits for ``finish.py``, or a part is damaged that finished bundles have."""
    if any(entry.get("key") is None for entry in manifest["kernels"]):
        raise BundleRefused(folder, [f"it is not finished: run its {FINISH} where CANN is installed"])
    if reasons := _misses(manifest, FINISHED, ""):
        raise BundleRefused(folder, [f"{NAME} is damaged: {'; '.join(reasons)}"])


def _misses(value, form, name: str) -> list[str]:
    """What a part of a manifest lacks of its form: the part is named, with what came."""
    kind = form if isinstance(form, type) else type(form)
    if not isinstance(value, kind):
        return [f"{name.strip('.')} is {'missing' if value is None else type(value).__name__}, not {kind.__name__}"]
    if isinstance(form, list):
        return [said for i, part in enumerate(value) for said in _misses(part, form[0], f"{name}{i}.")]
    if not isinstance(form, dict):
        return []
    parts = dict.fromkeys(value, form[ANY]) if ANY in form else form
    return [said for part, kind in parts.items() for said in _misses(value.get(part), kind, f"{name}{part}.")]
