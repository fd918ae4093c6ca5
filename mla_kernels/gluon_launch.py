"""GluonKernel: a kernel in Gluon, Triton's language of layouts and barriers, declared and launched like the others.

Gluon is imported with the kernel's file, and that where the kernel is first launched: never with the package, and never
on a chip or for an op that has no such kernel.
"""

import importlib
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from mla_kernels.launch import Kernel
from mla_kernels.placement import cpu_mode

TILE = "tile"
"""Type of an argument in a declaration: boxes that TMA copies, of a tensor with the kernel's element type."""
CODE_TILE = "tile of codes"
"""Likewise, of a tensor of e4m3 codes."""
_ELEMENTS = {CODE_TILE: "fp8e4nv"}


class Tiles(NamedTuple):
    """A tensor that TMA copies boxes from: its memory, and under which shape and strides (in elements) it is read.

    ``base`` starts at a multiple of 16 bytes, strides are multiples of 16 bytes, the last of one element.
    """

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Function:
    """Stands for a function of a module that is not imported yet."""

    def __init__(self, module: str, name: str, parameters: tuple[str, ...]):
        self.__module__, self.__name__ = module, name
        self.__code__ = types.SimpleNamespace(co_varnames=parameters, co_argcount=len(parameters))

    @property
    def loaded(self):
        """The function itself."""
        return getattr(importlib.import_module(self.__module__), self.__name__)

    @property
    def params(self):
        return self.loaded.params

    def __getitem__(self, grid):
        return self.loaded[grid]


class GluonKernel(Kernel):
    """One Gluon kernel and what is known about it.

    Args:
        module: the module that holds it, and with it imports Gluon.
        name: the ``@gluon.jit`` function. Its parameters are ``arguments``, ``statics`` and the constants of ``tiles``,
            in this order. The first argument is a pointer.
        boxes: ``statics -> {argument: shape}``: the boxes in which arguments of type TILE or CODE_TILE are copied.
        worker_warps: warps that the kernel starts beside ``num_warps``.
        box_type: ``(dtype, statics) -> Triton type`` of the elements of type TILE; None: the kernel's element type.
        declaration: as for :class:`mla_kernels.launch.Kernel`. A constant REGISTERS of ``tiles`` is also the limit a
            thread at launch, from which partitions are dealt theirs.
    """

    language = "gluon"
    emulated_seed = 0
    """Of the order in which an emulated launch lets things happen."""

    def __init__(
        self,
        module: str,
        name: str,
        *,
        boxes: Callable[[Mapping], Mapping[str, tuple[int, ...]]],
        worker_warps: int,
        box_type: Callable[[str, Mapping], str] | None = None,
        **declaration,
    ):
        self.boxes, self.worker_warps = boxes, worker_warps
        self.box_type = box_type
        constants = (tile for tile in declaration["tiles"] if not tile.startswith("num_"))
        parameters = (*declaration["arguments"], *declaration["statics"], *constants)
        super().__init__(_Function(module, name, parameters), **declaration)

    def signature(self, dtype: str, statics: Mapping) -> dict[str, str]:
        """As :meth:`Kernel.signature`; a tile is ``tile<bf16[1,64,128]>``, whose layout the compiler process adds."""
        boxes = {name: ",".join(map(str, box)) for name, box in self.boxes(statics).items()}
        known = super().signature(dtype, statics)
        own = self.box_type(dtype, statics) if self.box_type else dtype
        elements = {name: _ELEMENTS.get(self.arguments[name], own) for name in boxes}
        return known | {name: f"{TILE}<{elements[name]}[{box}]>" for name, box in boxes.items()}

    def options(self, chip, tile):
        """As :meth:`Kernel.options`, and the registers a thread that partitions are dealt from."""
        dealt = {"maxnreg": tile["REGISTERS"]} if "REGISTERS" in tile else {}
        return super().options(chip, tile) | dealt

    def launch(self, chip, work: int, args: tuple, statics: Mapping, tile: Mapping) -> None:
        """As :meth:`Kernel.launch`, with :class:`Tiles` for arguments of type TILE or CODE_TILE.

        Triton's launcher encodes their TMA descriptors at every launch.
        """
        if work and not args[0].is_meta:
            args = self.described(args, statics)
        super().launch(chip, work, args, statics, tile)

    def described(self, args: tuple, statics: Mapping) -> list:
        """``args`` with Triton's descriptor for each tile."""
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        boxes = self.boxes(statics)
        described = list(args)
        for place, name in enumerate(self.arguments):
            if name in boxes:
                base, shape, strides = args[place]
                bits = 8 * base.element_size()
                width = min(128, boxes[name][-1] * base.element_size())
                layout = NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=len(shape))
                described[place] = TensorDescriptor(base, list(shape), list(strides), list(boxes[name]), layout)
        return described

    def _interpret(self, grid: int, args: tuple, statics: Mapping, tile: Mapping) -> None:
        """Execute the kernel's own source on the CPU, where it is asked for."""
        if cpu_mode() != "hopper-emulated":
            raise NotImplementedError(
                f"{self.name}: CPU tensors in mode {cpu_mode()!r}; a Gluon kernel runs on cuda and in 'hopper-emulated'"
            )
        from mla_kernels.targets.gluon import emulator

        emulator.run(
            self.fn.loaded, (grid,), args, self.constexprs(statics, tile),
            num_warps=tile["num_warps"], seed=self.emulated_seed,
        )  # fmt: skip
