"""The cached launch of a compiled kernel on a GPU: what Triton's JIT does at each launch, found in one dictionary.

Triton's launch examines every argument anew (15 to 30 us with 40 of them); here the arguments themselves are the key.
It holds all that Triton specialises on: types, which pointers lie on 16 bytes, integers, constants, options, and on AMD
which storages its buffer instructions cannot address. Integers stand in it as they are, since asking for their
properties takes longer; one not seen before goes through Triton's JIT, which compiles only where a property is new.

A launch, then, is one tuple, one look-up and one call of Triton's launcher. As in Triton, the function that does it is
written for each kernel's list of arguments, because a loop over them would take most of the time.
"""

import copy
import types
from collections.abc import Callable

import torch

from mla_kernels.language import HAS_TRITON, triton

MOST_LAUNCHES_KEPT = 4096
"""Entries of a kernel's cache; sizes that never repeat fill it, and it starts again."""

_ON_AMD = torch.version.hip is not None
_NO_HOOKS = types.SimpleNamespace(calls=())
_runtime = (  # triton-ascend, which launches on NPUs, has no knobs
    triton.knobs.runtime
    if hasattr(triton, "knobs")
    else types.SimpleNamespace(launch_enter_hook=_NO_HOOKS, launch_exit_hook=_NO_HOOKS)
)
_current_device = getattr(torch._C, "_cuda_getDevice", None)  # what Triton asks, once CUDA is up
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class GpuLaunch:
    """Launches one declared kernel, a :class:`mla_kernels.launch.Kernel`.

    ``launch(chip, grid, args, statics, tile)`` launches ``grid`` programs, tuned for ``chip``, where the first argument
    lies; ``known`` is its cache.
    """

    def __init__(self, kernel):
        self._kernel = kernel
        self.known: dict = {}
        self.launch = _written_launch(list(kernel.arguments.values()), self.known, self._elsewhere, self._through_jit)

    def _elsewhere(self, device, chip, grid, args, statics, tile):
        """Launch on a device that is not the current one."""
        with torch.cuda.device(device):
            self.launch(chip, grid, args, statics, tile)

    def _through_jit(self, key, chip, grid, args, statics, tile):
        """Launch through Triton's JIT: the first launch of a key, under which what it compiled is kept, and all
        launches while a profiler's hooks are set (key None)."""
        kernel = self._kernel
        if not HAS_TRITON:
            raise RuntimeError(f"{kernel.name}: the package triton is not installed; without it CPU tensors are served")
        for (name, kind), value in zip(kernel.arguments.items(), args):
            if kind == "fp32" and not isinstance(value, float):
                raise TypeError(f"{kernel.name}: {name}: got {type(value).__name__}, a float is accepted")
        constants = kernel.constexprs(statics, tile)
        compiled = kernel.jit[(grid,)](*args, **constants, **kernel.options(chip, tile))
        if key is None:
            return
        if len(self.known) >= MOST_LAUNCHES_KEPT:
            self.known.clear()
        self.known[key] = *_launcher(compiled), tuple(constants.values())


def _written_launch(kinds: list[str], known: dict, elsewhere: Callable, through_jit: Callable) -> Callable:
    """``(chip, grid, args, statics, tile)``: launch what ``known`` holds under these arguments' key; of a key that is
    not known, and while a profiler wants to see launches, ``through_jit``, and ``elsewhere`` what lies on a device that
    is not the current one. Triton's launcher gets addresses in place of tensors, as it accepts.

    CPU memory that poses as a device's, over a driver that does nothing, is on device -1 and stream 0.
    """
    every = range(len(kinds))
    tensors = [i for i in every if kinds[i].startswith("*")]
    addresses = [f"p{i}" for i in tensors]
    key = ["device", "aligned", *(f"a{i}.dtype" for i in tensors)]
    if _ON_AMD:
        key += [f"a{i}.untyped_storage().nbytes() >= 1 << 31" for i in tensors]
    # a tile's type follows from the constants
    key += [f"a{i}" for i in every if not kinds[i].startswith(("*", "fp32", "tile"))]
    values = ", ".join(f"p{i}" if i in tensors else f"a{i}" for i in every)
    lines = (
        "def launch(chip, grid, args, statics, tile):",
        f"    {', '.join(f'a{i}' for i in every)}, = args",
        f"    device = a{tensors[0]}.get_device()",
        "    stream = 0",
        "    if device >= 0:",
        "        if device != current_device():",
        "            return elsewhere(device, chip, grid, args, statics, tile)",
        "        stream = current_stream(device)",
        "    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:",
        "        return through_jit(None, chip, grid, args, statics, tile)",
        *(f"    p{i} = a{i}.data_ptr()" for i in tensors),
        f"    aligned = not ({' | '.join(addresses)}) & 15 or ({', '.join(f'p{i} & 15 == 0' for i in tensors)},)",
        f"    key = ({', '.join(key)}, *statics.values(), *tile.values())",
        "    found = known.get(key)",
        "    if found is None:",
        "        return through_jit(key, chip, grid, args, statics, tile)",
        "    run, rest, together, constants = found",
        "    if together:",
        f"        run(grid, 1, 1, stream, *rest, ({values}, *constants))",
        "    else:",
        f"        run(grid, 1, 1, stream, *rest, {values}, *constants)",
    )
    namespace = {
        "known": known, "elsewhere": elsewhere, "through_jit": through_jit, "runtime": _runtime,
        "current_device": _current_device, "current_stream": _current_stream,
    }  # fmt: skip
    exec("\n".join(lines), namespace)
    return namespace["launch"]


def _launcher(compiled) -> tuple[Callable, tuple, bool]:
    """``run, rest, together`` such that ``run(grid, 1, 1, stream, *rest, *values)`` launches what Triton compiled, or
    ``together`` with one tuple of the values."""
    run = compiled.run  # loads the module, which gives the handles
    function, packed = compiled.function, compiled.packed_metadata
    found = None if _ON_AMD else _without_python_half(run, function, packed)
    return found or (run, (function, packed, None, None, None), False)


def _without_python_half(run, function, packed) -> tuple[Callable, tuple, bool] | None:
    """Triton's C launcher behind its Python half ``run``, and what that half puts between the stream and the values;
    None where the half does more than hand arguments on.

    What it hands on differs from version to version, so it is asked: a copy of it is called with its C launcher
    replaced by a list. Triton 3.6 gives the values one by one, later versions as one tuple.
    """
    launch = getattr(run, "launch", None)
    if not isinstance(launch, types.BuiltinFunctionType) or getattr(run, "gsan_enabled", False):
        return None  # a wrapper that builds descriptors; an instrument that counts launches
    if run.global_scratch_size or run.profile_scratch_size:
        return None  # memory of its own for every launch
    handed: list[tuple] = []
    asked = copy.copy(run)
    asked.launch = lambda *arguments: handed.append(arguments)
    grid, stream, values = (object(), object(), object()), object(), (object(), object())
    asked(*grid, stream, function, packed, None, None, None, *values)
    (arguments,) = handed
    if arguments[:4] != (*grid, stream):
        return None
    if arguments[-1] == values:
        return launch, arguments[4:-1], True
    if arguments[-2:] == values:
        return launch, arguments[4:-2], False
    return None
