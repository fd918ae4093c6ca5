"""triton-ascend's Python finishes an Ascend bundle, with this Python's torch: both must be of one version.

Where they are not, as with Python 3.12, for which there is no triton-ascend, that test is left out; test_bundle.py
builds such a bundle everywhere.
"""

import sys
from pathlib import Path

from mla_kernels.targets import service


def versions() -> set[str]:
    """Of triton-ascend's Python, as its packages' folder says; none where there is no such environment."""
    try:
        return {path.name for path in Path(service.ascend_python()).parents[1].glob("lib/python3*")}
    except service.ToolchainMissing:
        return set()


ours = f"python3.{sys.version_info.minor}"
collect_ignore = ["test_ascend_finish.py"] if versions() not in (set(), {ours}) else []
