"""The card, its driver and the versions that a figure stands beside."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import mla_kernels


def has_gpu() -> bool:
    return torch.cuda.is_available()


def is_hopper() -> bool:
    """Whether the card has compute capability 9.0."""
    return torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)


def why_none() -> str:
    """What torch says where it sees no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs alone"
    return f"torch {torch.__version__} sees none"


def card() -> str:
    """The card's name, its architecture and memory."""
    part = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    architecture = part.gcnArchName.split(":")[0] if torch.version.hip else f"capability {major}.{minor}"
    return f"{part.name} ({architecture}, {part.multi_processor_count} cores, {part.total_memory / 2**30:.0f} GiB)"


def driver() -> str:
    """The driver's version; "" where its tool does not say."""
    if torch.version.hip:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text().strip() if path.is_file() else ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.split("\n")[0].strip() if found.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Of everything that a time depends on."""
    found = {"mla_kernels": mla_kernels.__version__ + revision(), "torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    return found | {"python": platform.python_version()}


def revision() -> str:
    """The commit of the checkout that is imported, in words, and whether it has changes; "" elsewhere."""
    folder = Path(mla_kernels.__file__).parents[1]
    kept = folder / "COMMIT"
    if kept.is_file():  # a folder that mla_kernels.device.prepare filled
        return f" (commit {kept.read_text().strip()})"
    if not (folder / ".git").exists():
        return ""
    try:
        at, changed = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" (commit {at.stdout.strip()}{' with changes' if changed.stdout.strip() else ''})" if at.stdout else ""
