"""The README's examples run, and the files it names exist."""

import re
from pathlib import Path

import torch

from mla_kernels import launch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 9
    names: dict = {}
    with launch.on_cpu("torch"):
        for block in blocks:
            if "enable(model)" in block or "ExpertParallel" in block:  # a model of transformers, a process group
                continue
            exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (2, 1, 16, 512) and names["y"].shape == (100, 2048)
    assert names["z"].shape == (100, 2048) and names["layer"].gate.weight.grad is not None
    assert names["sparse"].shape == (2, 1, 16, 512) and names["prefilled"].shape == (100, 16, 128)
    assert names["k_rope"].grad is not None and bool((names["picks"][0] >= 0).all())
    torch.testing.assert_close(names["merged"], names["out"])


def test_paths_exist():
    for path in (
        "reference",
        "autotune/tables",
        "mla_kernels/cpu",
        "mla_kernels/targets",
        "mla_kernels/compat",
        "bench",
    ):
        assert path.split("/")[0] in TEXT and (ROOT / path).is_dir()


def test_environment_variables_are_all_named():
    used = set()
    for folder in ("mla_kernels", "autotune", "reference"):
        for file in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"MLA_KERNELS_[A-Z_]+", file.read_text()))
    assert used == set(re.findall(r"MLA_KERNELS_[A-Z_]+", TEXT))
    assert len(used) <= 3  # and TRITON_INTERPRET
