"""The process that times, without a device: seconds follow from a tile, and a tile may end the process.

A request's "spoilt" is [constant, value, word]: at the tile with this value of the constant it does as the word says:
hang, die, fault (the device's context breaks), raise, wrong (of the results) or nothing.
"""

import os
import sys
import time
from dataclasses import asdict, replace

import torch

from mla_kernels import launch, tiles
from mla_kernels.autotune import child, problems, timing
from mla_kernels.autotune.models import MODELS
from mla_kernels.launch import KERNELS
from tests.autotune.test_problems import SMALL

KERNEL = "moe_combine_kernel"


def main() -> int:
    kernel, spoilt = KERNELS[KERNEL], []
    MODELS["small"] = replace(SMALL, formats=())
    operation = problems.OPERATIONS["fused_moe"]
    broken = []

    def build(geometry, size, make):
        call = operation.build(geometry, size, make)

        def run():
            results = call.run()
            constant, value, word = spoilt
            if tiles._overrides[kernel][constant] == value:
                if word == "hang":
                    time.sleep(600)
                if word == "die":
                    os._exit(7)
                if word == "fault":
                    broken.append(True)
                    raise RuntimeError("CUDA error: misaligned address")
                if word == "raise":
                    raise Exception("out of resource: shared memory")  # as Triton, whose errors have no other class
                if word == "wrong":
                    return tuple(result + 1 for result in results)
            return results

        return replace(call, run=run)

    problems.OPERATIONS["fused_moe"] = replace(operation, build=build)

    class Clock:
        def prepare(self, run):
            run()
            return lambda: 1.0 / tiles._overrides[kernel][spoilt[0]]

        def synchronise(self):
            if broken:
                raise RuntimeError("CUDA error: misaligned address was found")

    clock = Clock()
    here = timing.Here(torch.device("cpu"), clock)
    with launch.on_cpu("npu-emulated", "ascend910b"):

        def answer(asked, begin):
            spoilt[:] = asked["spoilt"]
            return asdict(here.measure(asked, begin))

        return child.serve(answer, clock.synchronise)


if __name__ == "__main__":
    sys.exit(main())
