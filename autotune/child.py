"""The process that times tiles, or compiles them beforehand: a JSON object a line in, JSON objects out.

-> a request of :func:`mla_kernels.autotune.timing.request`
<- {"begin": {...}}     before a tile's first launch; {"begin": null} before the samples
<- {"outcome": {...}}   or {"refused": "why it was not timed"}; {"fault": "..."} is the last line

With ``--compile`` tiles are compiled as a launch would do it, into Triton's cache, and nothing is launched: the answer
is {"outcome": {}}.
"""

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict

import torch

from mla_kernels import tiles
from mla_kernels.autotune import online, timing
from mla_kernels.device.clock import first_line
from mla_kernels.launch import KERNELS, chip_of, on_cpu
from mla_kernels.targets.chips import Chip
from mla_kernels.tiles import record_launches

FAULT = 3
"""Exit status where the device's context is broken."""


def serve(answer, synchronise=lambda: None) -> int:
    """Answer requests until there are no more. ``answer(request, begin)`` gives what stands under "outcome"."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(**words) -> None:
        out.write(json.dumps(words) + "\n")
        out.flush()

    say(ready=True)
    for line in sys.stdin:
        try:
            try:
                say(outcome=answer(json.loads(line), lambda tile: say(begin=tile)))
            except online.DeviceFault:
                raise
            except Exception as error:  # of whatever: it is told, and the next problem may do better
                refused = first_line(error)
                with _faults():
                    synchronise()
                say(refused=refused)
        except online.DeviceFault as fault:
            say(fault=str(fault))
            return FAULT
    return 0


@contextlib.contextmanager
def _faults():
    try:
        yield
    except Exception as error:
        raise online.DeviceFault(first_line(error)) from error


def compile_tiles(asked: dict, chip: Chip) -> None:
    """Compile the kernel of a request with each tile, as the op's launches would; nothing is launched."""
    kernel = KERNELS[asked["kernel"]]
    for tile in asked["tiles"]:
        with (
            on_cpu("torch", chip.device), tiles.silent(), record_launches() as launches, tiles.override(kernel, tile),
            torch.no_grad(),
        ):  # fmt: skip
            timing.build(asked, "meta").run()
        for launch in launches:
            if launch.kernel is kernel:
                constants = kernel.constexprs(launch.statics, launch.tile)
                args = kernel.described(launch.args, launch.statics)
                kernel.jit.warmup(*args, grid=(1,), **constants, **kernel.options(chip, launch.tile))


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m mla_kernels.autotune.child")
    options.add_argument("--device", default="cuda", help="a device of torch; with --stub: whose tiles are compiled")
    options.add_argument("--compile", action="store_true", help="only compile")
    options.add_argument("--stub", action="store_true", help="over a driver that does nothing")
    chosen = options.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    with contextlib.ExitStack() as stack:
        if chosen.stub:
            from mla_kernels.device import stub
            from mla_kernels.targets import devices

            stub.pose(stack, chosen.device)
            chip = devices.device(chosen.device)
        else:
            device = torch.device(chosen.device)
            chip = chip_of(device)
        if chosen.compile:
            return serve(lambda asked, begin: compile_tiles(asked, chip) or {})
        timer = online.DeviceTimer(device, chip.l2_bytes)
        here = timing.Here(device, timer)

        def answer(asked, begin):
            try:
                return asdict(here.measure(asked, begin))
            except torch.OutOfMemoryError:
                here.forget()
                torch.cuda.empty_cache()
                raise

        return serve(answer, timer.synchronise)


if __name__ == "__main__":
    sys.exit(main())
