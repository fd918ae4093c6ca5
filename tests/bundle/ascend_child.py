"""``ASCEND_PYTHON ascend_child.py PACKAGES BUNDLE``: an owner of CANN's machine, as far as it can be had without one.

Run with tests/bundle/hivmc, which writes a word instead of machine code, and bishengir-compile on PATH. The compiler
driver, the cache and the JIT of triton-ascend are the real ones; the NPU's driver is a stand-in. PACKAGES: a folder
with torch and this package.
Finishes the bundle, loads it, and asks triton-ascend's JIT for launches; prints as JSON what it compiled.
"""

import json
import site
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import make_backend
from triton.runtime import driver

ARCHITECTURE = "Ascend910B3"


class StandIn(DriverBase):
    """Of an NPU: it says which one it is."""

    def __init__(self):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return GPUTarget("npu", ARCHITECTURE, 0)

    def get_benchmarker(self):
        raise NotImplementedError

    @staticmethod
    def is_active():
        return True


class Utils:
    """Of triton-ascend's driver, which needs CANN to be built."""

    def get_arch(self):
        return ARCHITECTURE


def main(packages: str, path: str) -> dict:
    site.addsitedir(packages)  # behind this Python's own, whose triton is triton-ascend
    driver.set_active(StandIn())
    ascend = type(make_backend(StandIn().get_current_target())).add_stages.__globals__
    ascend["NPUUtils"] = Utils
    import torch

    import mla_kernels
    from mla_kernels import bundle, tiles
    from mla_kernels.autotune.making import Make
    from mla_kernels.autotune.models import geometry
    from mla_kernels.autotune.problems import OPERATIONS
    from mla_kernels.bundling.finish import finish
    from mla_kernels.launch import on_cpu

    said = []
    finish(Path(path), said.append)
    loaded = bundle.load(path)
    compiled = []
    original = ascend["make_ttir"]
    ascend["make_ttir"] = lambda *arguments: compiled.append("a kernel") or original(*arguments)
    g = geometry("deepseek-v3").on(8)
    launched = 0
    with on_cpu("torch", "910b"), tiles.record_launches() as launches, torch.no_grad():
        OPERATIONS["route"].build(g, {"tokens": 3}, Make("meta", torch.bfloat16)).run()
        for one in launches:
            constants = one.kernel.constexprs(one.statics, one.tile)
            code = one.kernel.fn.run(*one.args, grid=(1,), warmup=True, **constants)
            launched += code.asm["npubin"] is not None
    return {
        "version": mla_kernels.__version__, "said": said, "launched": launched, "compiled": compiled,
        "found": loaded.found, "missed": loaded.missed, "triton": triton.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
