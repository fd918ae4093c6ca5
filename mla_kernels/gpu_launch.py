"""The cached launch of a compiled kernel on a GPU: what Triton's JIT does at each launch, found in one dictionary.

Triton's launch examines every argument anew (15 to 30 us with 40 of them); here the arguments themselves are the key.
It holds all that Triton specialises on: types, which pointers lie on 16 bytes, integers, constants, options, and on AMD
which storages its buffer instructions cannot address. Integers stand in it as they are, since asking for their
properties takes longer; one not seen before goes through Triton's JIT, which compiles only where a property is new.

Launch, then, is one tuple, one look-up and one call of Triton's launcher. As in Triton, the function that takes the
arguments apart is written for each kernel's list of arguments, because a loop over them would take most of the time.
"""

from collections.abc import Callable

import torch

from mla_kernels.language import triton

MOST_LAUNCHES_KEPT = 4096
"""Entries of a kernel's cache; sizes that never repeat fill it, and it starts again."""

_ON_AMD = torch.version.hip is not None
_knobs = triton.knobs.runtime if hasattr(triton, "knobs") else None
_LAUNCHER_KNOWN = getattr(triton, "__version__", "").startswith("3.7.") and not _ON_AMD


class GpuLaunch:
    """Launches one declared kernel, a :class:`mla_kernels.launch.Kernel`."""

    def __init__(self, kernel):
        self._kernel = kernel
        self._known: dict = {}
        self._take_apart = _take_apart(list(kernel.arguments.values()))

    @property
    def known(self) -> int:
        """Entries of the cache."""
        return len(self._known)

    def __call__(self, device, chip, grid, args, statics, tile):
        """Launch ``grid`` programs on ``device``, tuned for ``chip``.

        Triton before 3.4 launches in another way; there every launch goes through its JIT.
        """
        if _knobs is None:
            self._through_jit(None, chip, grid, args, statics, tile)
            return
        active = triton.runtime.driver.active
        index = active.get_current_device()
        if device.index != index and device.type == "cuda":
            with torch.cuda.device(device):
                self(device, chip, grid, args, statics, tile)
            return
        key, values = self._take_apart(index, args, statics, tile)
        start = self._known.get(key)
        if start is None:
            self._through_jit(key, chip, grid, args, statics, tile)
        else:
            start(grid, active.get_current_stream(index), values, args)

    def _through_jit(self, key, chip, grid, args, statics, tile):
        """Launch through Triton's JIT, and keep what it compiled under ``key``."""
        kernel = self._kernel
        for (name, kind), value in zip(kernel.arguments.items(), args):
            if kind == "fp32" and not isinstance(value, float):
                raise TypeError(f"{kernel.name}: {name}: got {type(value).__name__}, a float is accepted")
        constants = kernel.constexprs(statics, tile)
        compiled = kernel.fn[(grid,)](*args, **constants, **kernel.options(chip, tile))
        if key is None:
            return
        if len(self._known) >= MOST_LAUNCHES_KEPT:
            self._known.clear()
        self._known[key] = _starter(compiled, tuple(constants.values()))


def _take_apart(kinds: list[str]) -> Callable:
    """``(device index, args, statics, tile) -> (key, values)``: values are args with addresses in place of tensors,
    which Triton's launcher takes as they are."""
    every = range(len(kinds))
    tensors = [i for i in every if kinds[i].startswith("*")]
    addresses = [f"p{i}" for i in tensors]
    key = ["index", "aligned", *(f"a{i}.dtype" for i in tensors)]
    if _ON_AMD:
        key += [f"a{i}.untyped_storage().nbytes() >= 1 << 31" for i in tensors]
    key += [f"a{i}" for i in every if not kinds[i].startswith(("*", "fp32"))]
    lines = (
        "def take_apart(index, args, statics, tile):",
        f"    {', '.join(f'a{i}' for i in every)}, = args",
        *(f"    p{i} = a{i}.data_ptr()" for i in tensors),
        f"    aligned = not ({' | '.join(addresses)}) & 15 or ({', '.join(f'p{i} & 15 == 0' for i in tensors)},)",
        f"    key = ({', '.join(key)}, *statics.values(), *tile.values())",
        f"    return key, ({', '.join(f'p{i}' if i in tensors else f'a{i}' for i in every)},)",
    )
    namespace: dict = {}
    exec("\n".join(lines), namespace)
    return namespace["take_apart"]


def _hook(chain):
    """A profiler's hook, or None where there is none: Triton calls even an empty chain of hooks from C."""
    return chain if getattr(chain, "calls", chain) else None


def _starter(compiled, constants: tuple) -> Callable:
    """``(grid, stream, values, args) -> None`` for a kernel that Triton compiled."""
    run = compiled.run  # loads the module, which gives the handles
    function, packed = compiled.function, compiled.packed_metadata

    def start(grid, stream, values, args):
        enter, leave = _hook(_knobs.launch_enter_hook), _hook(_knobs.launch_exit_hook)
        metadata = None if enter is None else compiled.launch_metadata((grid,), stream, *args, *constants)
        run(grid, 1, 1, stream, function, packed, metadata, enter, leave, *values, *constants)

    enter_hooks, exit_hooks = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    chains = hasattr(enter_hooks, "calls") and hasattr(exit_hooks, "calls")
    if not (_LAUNCHER_KNOWN and chains) or run.global_scratch_size or run.profile_scratch_size:
        return start
    # Triton 3.7's CudaLauncher, without its Python half: no scratch memory, no tensor descriptors, no hooks.
    launch, cooperative, dependent = run.launch, run.launch_cooperative_grid, run.launch_pdl
    annotations, signature = run.arg_annotations, run.kernel_signature

    def start_at_once(grid, stream, values, args):
        if enter_hooks.calls or exit_hooks.calls:
            start(grid, stream, values, args)
            return
        launch(
            grid, 1, 1, stream, function, cooperative, dependent, packed, None, None, None, None, None,
            annotations, signature, values + constants,
        )  # fmt: skip

    return start_at_once
