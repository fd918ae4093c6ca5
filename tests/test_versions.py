"""Versions of torch and Triton outside the bounds are refused at import, in one sentence; pyproject.toml agrees."""

import subprocess
import sys
from pathlib import Path

import pytest

from mla_kernels import versions

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "text, number",
    [
        ("2.11.0", (2, 11)),
        ("2.15.0+cu132", (2, 15)),
        ("2.16.0a0", (2, 16)),
        ("2.13.0a0+git9f1c2ab", (2, 13)),
        ("2.12.0.dev20260101", (2, 12)),
        ("3.10", (3, 10)),
        ("3.9.0+fb9a2c3", (3, 9)),
    ],
)
def test_numbers_are_read_whatever_follows_them(text, number):
    assert versions.minor(text) == number


def test_what_is_no_version_is_refused():
    with pytest.raises(ImportError, match="version 'unknown': numbers as in"):
        versions.minor("unknown")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1"])
def test_torch_inside_the_bounds(version):
    versions.check("torch", version, versions.TORCH)


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0", "2.10.2", "2.16.0a0", "3.0.0"])
def test_torch_outside_the_bounds(version):
    with pytest.raises(ImportError) as refused:
        versions.check("torch", version, versions.TORCH)
    assert str(refused.value) == f"torch {version} is installed; mla_kernels accepts torch>=2.11,<2.16"


@pytest.mark.parametrize("version, right", [("3.5.1", False), ("3.6.0", True), ("3.9.2", True), ("3.10.0", False)])
def test_minor_versions_are_numbers_not_texts(version, right):
    if right:
        versions.check("triton", version, versions.TRITON)
    else:
        with pytest.raises(ImportError, match=rf"triton {version} is .* accepts triton>=3\.6,<3\.10"):
            versions.check("triton", version, versions.TRITON)


IMPORTS = """
import sys, torch, triton

def refusal():
    try:
        import mla_kernels
    except ImportError as error:
        return str(error)

right = torch.__version__
torch.__version__ = "2.10.1+cu128"
print(refusal())
torch.__version__, triton.__version__ = right, "3.2.0"
print(refusal())
triton.__file__ = sys.argv[1]
print(refusal())
"""


def test_the_import_is_refused_before_anything_else_happens(tmp_path):
    """The last of the three is triton-ascend, whose package has a backend that Triton has not."""
    (tmp_path / "backends" / "ascend").mkdir(parents=True)
    command = [sys.executable, "-c", IMPORTS, str(tmp_path / "__init__.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines() == [
        "torch 2.10.1+cu128 is installed; mla_kernels accepts torch>=2.11,<2.16",
        "triton 3.2.0 is installed; mla_kernels accepts triton>=3.6,<3.10",
        "None",
    ], done.stderr


def test_the_package_declares_the_bounds_that_the_code_has():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"torch{versions.accepted(versions.TORCH)}"' in text
    assert f'"triton{versions.accepted(versions.TRITON)};' in text
