"""The versions of torch and Triton that the package runs on; importing this module refuses all others.

An older one fails somewhere inside an op, a newer one was never run: both are told here, in words, before anything
else of the package is imported.
"""

import re
from pathlib import Path

import torch

from mla_kernels.language import HAS_TRITON, triton

Version = tuple[int, int]

TORCH: tuple[Version, Version] = (2, 11), (2, 16)
"""The first minor version that is accepted, and the first after it that is not."""
TRITON: tuple[Version, Version] = (3, 6), (3, 10)
"""Not of triton-ascend: its package is called ``triton``, too, and has numbers of its own."""


def minor(version: str) -> Version:
    """(2, 15) of "2.15.0+cu132", "2.15.0a0+git1234" and "2.15"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ImportError(f"version {version!r}: numbers as in 2.15.0 are accepted")
    return int(found[1]), int(found[2])


def accepted(bounds: tuple[Version, Version]) -> str:
    """The bounds as a requirement has them: >=2.11,<2.16."""
    (first, second), (above, over) = bounds
    return f">={first}.{second},<{above}.{over}"


def check(package: str, version: str, bounds: tuple[Version, Version]) -> None:
    """Raise ImportError where ``version`` of ``package`` lies outside ``bounds``."""
    if not bounds[0] <= minor(version) < bounds[1]:
        raise ImportError(f"{package} {version} is installed; mla_kernels accepts {package}{accepted(bounds)}")


check("torch", torch.__version__, TORCH)
if HAS_TRITON and not (Path(triton.__file__).parent / "backends" / "ascend").is_dir():
    check("triton", triton.__version__, TRITON)
