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
_runtime = triton.knobs.runtime if hasattr(triton, "knobs") else None  # triton-ascend, which launches on NPUs, has none


def _hooked() -> bool:
    """Whether a profiler wants to see launches."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)


class GpuLaunch:
    """Launches one declared kernel, a :class:`mla_kernels.launch.Kernel`."""

    def __init__(self, kernel):
        self._kernel = kernel
        self._known: dict = {}
        self._launch = _written_launch(list(kernel.arguments.values()))

    @property
    def known(self) -> int:
        """Entries of the cache."""
        return len(self._known)

    def __call__(self, chip, grid, args, statics, tile):
        """Launch ``grid`` programs, tuned for ``chip``, where the first argument lies.

        Through Triton's JIT go the first launch of a key and all launches while a profiler's hooks are set.
        """
        if _hooked():
            self._through_jit(None, chip, grid, args, statics, tile)
            return
        active = triton.runtime.driver.active
        index = active.get_current_device()
        device = args[0].get_device()
        if device != index and device >= 0:  # below 0: CPU memory posing as a device's
            with torch.cuda.device(device):
                self(chip, grid, args, statics, tile)
            return
        new = self._launch(self._known, index, active.get_current_stream(index), grid, args, statics, tile)
        if new is not None:
            self._through_jit(new, chip, grid, args, statics, tile)

    def _through_jit(self, key, chip, grid, args, statics, tile):
        """Launch through Triton's JIT, and keep what it compiled under ``key``."""
        kernel = self._kernel
        if not HAS_TRITON:
            raise RuntimeError(f"{kernel.name}: the package triton is not installed; without it CPU tensors are served")
        for (name, kind), value in zip(kernel.arguments.items(), args):
            if kind == "fp32" and not isinstance(value, float):
                raise TypeError(f"{kernel.name}: {name}: got {type(value).__name__}, a float is accepted")
        constants = kernel.constexprs(statics, tile)
        compiled = kernel.fn[(grid,)](*args, **constants, **kernel.options(chip, tile))
        if key is None:
            return
        if len(self._known) >= MOST_LAUNCHES_KEPT:
            self._known.clear()
        self._known[key] = *_launcher(compiled), tuple(constants.values())


def _written_launch(kinds: list[str]) -> Callable:
    """``(known, device index, stream, grid, args, statics, tile)``: launch what ``known`` holds under these arguments'
    key and return None, or return the key. Triton's launcher gets addresses in place of tensors, as it accepts."""
    every = range(len(kinds))
    tensors = [i for i in every if kinds[i].startswith("*")]
    addresses = [f"p{i}" for i in tensors]
    key = ["index", "aligned", *(f"a{i}.dtype" for i in tensors)]
    if _ON_AMD:
        key += [f"a{i}.untyped_storage().nbytes() >= 1 << 31" for i in tensors]
    key += [f"a{i}" for i in every if not kinds[i].startswith(("*", "fp32"))]
    lines = (
        "def launch(known, index, stream, grid, args, statics, tile):",
        f"    {', '.join(f'a{i}' for i in every)}, = args",
        *(f"    p{i} = a{i}.data_ptr()" for i in tensors),
        f"    aligned = not ({' | '.join(addresses)}) & 15 or ({', '.join(f'p{i} & 15 == 0' for i in tensors)},)",
        f"    key = ({', '.join(key)}, *statics.values(), *tile.values())",
        "    found = known.get(key)",
        "    if found is None:",
        "        return key",
        "    run, rest, constants = found",
        f"    values = {', '.join(f'p{i}' if i in tensors else f'a{i}' for i in every)}, *constants",
        "    run(grid, 1, 1, stream, *rest, values)",
    )
    namespace: dict = {}
    exec("\n".join(lines), namespace)
    return namespace["launch"]


def _launcher(compiled) -> tuple[Callable, tuple]:
    """``run, rest`` such that ``run(grid, 1, 1, stream, *rest, values)`` launches what Triton compiled."""
    run = compiled.run  # loads the module, which gives the handles
    function, packed = compiled.function, compiled.packed_metadata
    found = None if _ON_AMD else _without_python_half(run, function, packed)
    if found is not None:
        return found

    def start(x, y, z, stream, values):
        run(x, y, z, stream, function, packed, None, None, None, *values)

    return start, ()


def _without_python_half(run, function, packed) -> tuple[Callable, tuple] | None:
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
        return launch, arguments[4:-1]
    if arguments[-2:] == values:
        rest = arguments[4:-2]

        def start(x, y, z, stream, values):
            launch(x, y, z, stream, *rest, *values)

        return start, ()
    return None
