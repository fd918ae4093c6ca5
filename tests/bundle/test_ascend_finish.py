"""A bundle for Ascend, finished with a stand-in for CANN's last step. conftest.py says where it is left out."""

import json
import os
import sysconfig
from pathlib import Path

from mla_kernels.targets import service
from tests.bundle.building import HERE, build, child


def test_finished_by_a_stand_in(tmp_path):
    """triton-ascend's own compiler writes the code, its own JIT finds it. What stands in for hivmc compiles nothing."""
    folder = tmp_path / "910b"
    build(folder, "910b", "route")
    python = service.ascend_python()
    (compilers,) = Path(python).parents[1].glob("lib/python*/site-packages/ascendnpuir/bin")
    path = os.pathsep.join([str(HERE), str(compilers), os.environ["PATH"]])
    said, text = child(
        [python, HERE / "ascend_child.py", sysconfig.get_path("purelib"), folder],
        PATH=path, ASCEND_HOME_PATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert said["compiled"] == [] and said["found"] == {"route_kernel": 1} and said["launched"] == 1, text
    assert json.loads((folder / "manifest.json").read_text())["kernels"][0]["files"].keys() == {
        "route_kernel.npubin", "route_kernel.json"
    }  # fmt: skip
