"""Which kernels a model's calls launch, each once for everything that Triton compiles it anew for."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from mla_kernels import tiles
from mla_kernels.bundling.steps import Step
from mla_kernels.language import triton
from mla_kernels.launch import on_cpu
from mla_kernels.targets.chips import Chip

LOG = logging.getLogger("mla_kernels.bundling")


@dataclass
class Wanted:
    """A kernel to compile. ``specialisation``: Triton's own description, which its ``preload`` takes."""

    kernel: "object"  # a launch.Kernel
    specialisation: str
    tile: dict
    used_by: list[str] = field(default_factory=list)

    @property
    def described(self) -> dict:
        """Signature, constants, arguments that are divisible by 16, and launch options."""
        made = json.loads(self.specialisation)
        names = list(made["signature"])
        divisible = [names[place[0]] for place, what in zip(made["attrs_keys"], made["attrs_vals"]) if what]
        constants = {names[place[0]]: value for place, value in zip(made["constant_keys"], made["constant_vals"])}
        chosen = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
        return {
            "signature": made["signature"],
            "constants": constants,
            "divisible by 16": divisible,
            "options": {name: made["options"][name] for name in chosen if name in made["options"]},
        }


def collect(
    steps: Iterable[Step], chip: Chip, specialise: Callable, say: Callable[[str], None] = LOG.info
) -> tuple[list, dict[str, str]]:
    """What the steps launch, in order of appearance, and step -> reason for those that have no path on ``chip``.

    ``specialise(found, launch, step's name)`` enters a launch into ``found``, under a key of all that a compiler
    compiles it anew for.
    """
    found: dict = {}
    refused: dict[str, str] = {}
    with on_cpu("torch", chip.device), tiles.silent(), tiles.record_launches() as launches, torch.no_grad():
        for step in steps:
            before = len(found)
            for size in step.sizes:
                launches.clear()
                try:
                    step.call(size)
                except (NotImplementedError, ValueError) as error:
                    refused[step.name] = str(error)
                    break
                for launch in launches:
                    specialise(found, launch, step.name)
            say(f"{step.name}: {len(step.sizes)} sizes, {len(found) - before} kernels more")
    return list(found.values()), refused


def gpu_launches(steps: Iterable[Step], chip: Chip, say=LOG.info) -> tuple[list[Wanted], dict[str, str]]:
    """As :func:`collect`, by Triton's own rules: its JIT is asked for every launch, and stopped before it compiles.

    Triton's driver must be that of ``chip``: :func:`mla_kernels.bundling.offline.pose`.
    """
    asked: list[tuple] = []

    def stop(*, key, fn, compile, **_):
        asked.append((key, compile["specialization_data"]))
        return True

    def specialise(found, launch, name):
        kernel, constants = launch.kernel, launch.kernel.constexprs(launch.statics, launch.tile)
        args = kernel.described(launch.args, launch.statics)
        asked.clear()
        kernel.jit.warmup(*args, grid=(1,), **constants, **kernel.options(launch.chip, launch.tile))
        ((key, data),) = asked
        wanted = found.get((kernel.name, key))
        if wanted is None:
            wanted = found[kernel.name, key] = Wanted(kernel, data, dict(launch.tile))
        if name not in wanted.used_by:
            wanted.used_by.append(name)

    hook, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, stop
    try:
        return collect(steps, chip, specialise, say)
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
