"""Which files of other libraries there are: under the names that they have in the wheels, in the folder that
``python -m mla_kernels.device.get_peers`` filled, and among the installed packages."""

import importlib.metadata
import json
import sys
from pathlib import Path

MANIFEST = "peers.json"
HOW = "python -m mla_kernels.device.get_peers FOLDER brings them; then --peers FOLDER"

NEEDS = {
    "FlashMLA": ("vllm", ("vllm/_flashmla_C.abi3.so",)),
    "vLLM": ("vllm", ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so")),
    "FlashAttention-3": ("fa3-fwd", ("fa3_fwd/_C.abi3.so",)),
    "SGLang": (
        "sglang",
        (
            "sglang/kernels/ops/attention/score_mod.py",
            "sglang/kernels/ops/attention/decode_attention.py",
            "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
            "sglang/kernels/ops/moe/moe_align_small_numel.py",
        ),
    ),
    "DeepGEMM": (
        "vllm",
        ("vllm/third_party/deep_gemm/__init__.py", "vllm/model_executor/layers/fused_moe/deep_gemm_utils.py"),
    ),
}
"""Peer -> the package whose wheel holds it, and its files there."""
TESTED = {"vllm": "0.26.0", "sglang": "0.5.20", "fa3-fwd": "0.0.3"}
"""The versions that the wrappers were written for; others are tried, and said."""


def roots(folder: Path | None) -> list[Path]:
    """Where files are sought: the folder before the installed packages."""
    return [Path(path) for path in ([folder] if folder else []) + sys.path if path]


def manifest(folder: Path | None) -> dict:
    """Of the folder, as get_peers wrote it: {"versions": {package: version}, "capability": ...}."""
    try:
        return json.loads((folder / MANIFEST).read_text()) if folder else {}
    except (OSError, ValueError):
        return {}


def where(name: str, folder: Path | None) -> Path | None:
    """The root under which all files of this peer stand."""
    _, files = NEEDS[name]
    return next((root for root in roots(folder) if all((root / file).is_file() for file in files)), None)


def find(folder: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """(peer -> package and version, peer -> why it is missing), from the files alone."""
    versions, missing, known = {}, {}, manifest(folder).get("versions", {})
    for name, (package, files) in NEEDS.items():
        root = where(name, folder)
        if root is None:
            missing[name] = f"{files[0]} is neither in the folder of peers nor among the installed packages"
            continue
        version = known.get(package) if folder and root == folder else _installed(package)
        versions[name] = f"{package} {version or 'of unknown version'}"
        if version != TESTED[package]:
            versions[name] += f" (written for {TESTED[package]})"
    return versions, missing


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
