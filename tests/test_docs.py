"""The README and the documentation: every example runs, every path and environment variable is what the text says.

All ``python`` blocks of a page are one module, made from the page with its other lines left empty, so that a traceback
names the page's own line. CPU tensors run the torch code, and "cuda" stands for "cpu".
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla_kernels import launch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]}
FENCE = re.compile(r"^```")
KERNEL_PAGE = "writing-a-kernel.md"  # has tests of its own
WITHOUT_EXAMPLES = {
    "CONTRIBUTING.md", "design.md", "index.md", "performance.md", "verification.md", "versions.md",
}  # fmt: skip


def code(text: str) -> str:
    """The page's ``python`` blocks at the lines where they stand, every other line empty."""
    lines, inside, language = [], False, ""
    for line in text.splitlines():
        if FENCE.match(line):
            inside, language = not inside, line[3:].strip()
            lines.append("")
        else:
            lines.append(line if inside and language == "python" else "")
    assert not inside, "a fence is not closed"
    return "\n".join(lines) + "\n"


def module_of(page: str, folder: Path) -> Path:
    path = folder / f"{Path(page).stem.replace('-', '_')}_page.py"
    path.write_text(code(PAGES[page].read_text()).replace('"cuda"', '"cpu"'))
    return path


def run(page: str, folder: Path) -> dict:
    """Run the page's blocks in one namespace; return its names."""
    path = module_of(page, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with launch.on_cpu("torch"):
        spec.loader.exec_module(module)
    return vars(module)


def test_pages_with_examples():
    """A page without a block is meant to have none."""
    assert {page for page, path in PAGES.items() if "```python" not in path.read_text()} == WITHOUT_EXAMPLES


def test_writing_a_kernel(tmp_path):
    """The page is a test file: on every backend, and every target's compiler."""
    path = module_of(KERNEL_PAGE, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    options = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--backend", "cpu,interpret,npu-emulated", "-p", "no:xdist", str(path)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0 and "29 passed" in child.stdout, child.stdout + child.stderr
