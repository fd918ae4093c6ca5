"""Bundles built, and used, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

from tests.children import child_environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = ["--model", "deepseek-v3", "--tp", "8", "--batch", "2", "--tokens", "4", "--queries", "1"]
SMALL += ["--contexts", "128", "--jobs", "1"]


def child(command, **environment):
    """What the child printed last, from JSON, and its other output."""
    done = subprocess.run(
        list(map(str, command)), env=child_environment(**environment), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def build(folder: Path, target: str, *only: str, arguments=SMALL) -> dict:
    """The manifest of a bundle that the command built in a process of its own."""
    chosen = ["--only", ",".join(only)] if only else []
    done = subprocess.run(
        [sys.executable, "-m", "mla_kernels", "build", *arguments, "--target", target, *chosen, "-o", str(folder)],
        env=child_environment(), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "manifest.json").read_text())
