"""Bundles for Ascend: as far as the open compilers go, and what the owner of CANN needs to finish them.

A launch there goes through triton-ascend's JIT with kernel arguments and constants alone. What it specialises on is the
same as on GPUs, and found here by the same rules: types, integers that are 1, and what is divisible by 16.
"""

import functools
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mla_kernels.bundle import manifest
from mla_kernels.bundling import finish
from mla_kernels.bundling.gpu import Failed
from mla_kernels.bundling.launches import LOG, collect
from mla_kernels.bundling.steps import Step
from mla_kernels.targets import service
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.compile import compiler_version

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
"""triton-ascend's names of element types."""
STAGES = ("ttadapter.mlir", "planned.mlir")
"""What is kept of each kernel: the IR that bishengir-compile reads, and the last that is open, which hivmc reads."""


@dataclass
class Wanted:
    """A kernel to lower. ``attributes``: positions of arguments by what triton-ascend found of them."""

    kernel: "object"  # a launch.Kernel
    signature: dict[str, str]
    constants: dict
    attributes: dict[str, list[int]]
    tile: dict
    used_by: list[str] = field(default_factory=list)

    @property
    def described(self) -> dict:
        return {"signature": self.signature, "constants": self.constants, "attributes": self.attributes, "options": {}}


def launches(steps: Iterable[Step], chip: Chip, say=LOG.info) -> tuple[list[Wanted], dict[str, str]]:
    """What the steps launch on ``chip``, each once; and step -> reason for those that have no path there."""

    def specialise(found, launch, name):
        constants = launch.kernel.constexprs(launch.statics, launch.tile)
        signature, ones, attributes = specialisation(launch.kernel, launch.args, constants)
        constants |= ones
        key = launch.kernel.name, json.dumps([signature, constants, attributes], sort_keys=True)
        wanted = found.get(key)
        if wanted is None:
            wanted = found[key] = Wanted(launch.kernel, signature, constants, attributes, dict(launch.tile))
        if name not in wanted.used_by:
            wanted.used_by.append(name)

    return collect(steps, chip, specialise, say)


def specialisation(kernel, args: tuple, constants: dict) -> tuple[dict[str, str], dict[str, int], dict[str, list[int]]]:
    """(types, arguments that are 1, positions by attribute) as triton-ascend's JIT finds them of ``args``.

    It looks at constants, too, which changes no code, but the key that code is looked up by.
    """
    signature, ones, divisible, equal = {}, {}, [], []
    for position, value in enumerate(constants.values(), len(args)):
        divisible += [position] if isinstance(value, int) and value % 16 == 0 else []
        equal += [position] if type(value) is int and value == 1 else []
    for position, (parameter, value) in enumerate(zip(kernel.fn.params, args)):
        aligned = False
        if isinstance(value, torch.Tensor):
            kind, aligned = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            kind, aligned = "i32" if -(1 << 31) <= value < 1 << 31 else "i64", value % 16 == 0
            if value == 1 and not parameter.do_not_specialize:
                ones[parameter.name] = 1
                equal.append(position)
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            divisible.append(position)
    return signature, ones, {"tt.divisibility": sorted(divisible), "tt.equal_to": sorted(equal)}


def compile_all(wanted: list[Wanted], chip: Chip, folder: Path, jobs: int, say) -> list[dict]:
    """Entries of the manifest, in the order of ``wanted``, without keys: these are known where CANN is.

    Raises:
        Failed: the compiler refused a kernel. ToolchainMissing: triton-ascend or ascendnpu-ir is not installed.
    """
    toolchain()  # says what is missing
    pool, futures, entries = service.Pool(jobs), {}, [None] * len(wanted)
    try:
        for index, one in enumerate(wanted):
            name = manifest.digest(json.dumps([one.kernel.name, one.described], sort_keys=True).encode())[:32]
            place = folder / manifest.FOLDER / name
            place.mkdir(parents=True)
            job = {
                "action": "report", "source": one.kernel.source, "function": one.kernel.name, "language": "triton",
                "signature": one.signature, "constexprs": one.constants, "vendor": chip.vendor,
                "architecture": chip.architecture, "options": {}, "attributes": one.attributes,
                "output": str(place / one.kernel.name),
            }  # fmt: skip
            futures[pool.submit("lowering", job)] = index, place
        for done, future in enumerate(as_completed(futures), 1):
            (index, place), answer = futures[future], future.result()
            one = wanted[index]
            if not answer["ok"]:
                for other in futures:
                    other.cancel()
                described = " ".join(f"{name}={value}" for name, value in one.tile.items())
                raise Failed(f"{one.kernel.name} ({described}) for {chip.part}: {answer['reason']}")
            stages = {}
            for path in sorted(place.iterdir()):
                data = path.read_bytes()
                stages[path.name] = {"sha256": manifest.digest(data), "bytes": len(data)}
            entries[index] = {
                "kernel": one.kernel.name, "key": None, **one.described, "tile": one.tile, "used by": one.used_by,
                "seconds": answer["seconds"], "memory": answer["memory"], "folder": place.name, "stages": stages,
                "files": {},
            }  # fmt: skip
            if done % 25 == 0 or done == len(wanted):
                say(f"{done} of {len(wanted)} kernels lowered")
    finally:
        pool.stop()
    shutil.copyfile(finish.__file__, folder / manifest.FINISH)
    return entries


@functools.cache
def toolchain() -> dict:
    """Versions of the open compilers."""
    versions = dict(part.split(" ") for part in compiler_version("ascend").split(", "))
    return {"triton": versions["triton-ascend"], "ascendnpu-ir": versions["ascendnpu-ir"], "settings": {}}
