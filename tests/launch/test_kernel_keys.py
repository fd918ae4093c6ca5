"""The key under which a compiled kernel is kept on disk: the same in every process, whatever was launched before."""

import json
import subprocess
import sys

from tests.children import child_environment

PROGRAM = """
import json, sys
import mla_kernels
from mla_kernels.launch import KERNELS
names = sorted(KERNELS, reverse=sys.argv[1] == "backwards")
hashes = [KERNELS[name].source_hash for name in names if sys.argv[1] == "backwards"]  # as a launch looks up its tile
print(json.dumps({name: KERNELS[name].jit.cache_key for name in names}))
"""


def keys(order: str) -> dict[str, str]:
    command = [sys.executable, "-c", PROGRAM, order]
    child = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_keys_do_not_depend_on_which_kernel_comes_first():
    """By itself Triton 3.6 gave 24 of 85 kernels another key when they were asked the other way round."""
    forwards = keys("forwards")
    assert len(forwards) > 80 and forwards == keys("backwards")
