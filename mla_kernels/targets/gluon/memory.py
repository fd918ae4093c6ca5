"""Global memory of the Gluon emulator: pointers and TMA descriptors over the storages of CPU tensors."""

import numpy as np
import torch

from mla_kernels.targets.gluon import layouts, values
from mla_kernels.targets.gluon.elements import BITS, decode, encode, itemsize, torch_to_triton
from mla_kernels.targets.gluon.errors import OutOfBoundsError
from mla_kernels.targets.gluon.schedule import here, line
from mla_kernels.targets.gluon.values import Block, Pointer


class Argument:
    """A tensor argument: its storage as bytes, and where in it the tensor begins."""

    def __init__(self, name: str, tensor: torch.Tensor):
        if tensor.device.type != "cpu":
            raise ValueError(f"argument {name} is on {tensor.device}; the emulator takes CPU tensors")
        self.name, self.shape = name, list(tensor.shape)
        self.element = torch_to_triton(tensor.dtype)
        storage = tensor.untyped_storage()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.address = storage.data_ptr()
        self.start = tensor.storage_offset() * tensor.element_size()
        self._elements: dict[int, np.ndarray] = {}

    def pointer(self) -> Pointer:
        from mla_kernels.language import tl

        return Pointer(self, np.asarray(self.start, np.int64), tl.pointer_type(self.element))

    def elements(self, size: int) -> np.ndarray:
        """The storage as unsigned integers of ``size`` bytes."""
        if size not in self._elements:
            self._elements[size] = self.bytes[: self.bytes.size // size * size].view(BITS[size])
        return self._elements[size]


def _places(pointer: Pointer, active: np.ndarray | None, what: str) -> np.ndarray:
    """Elements of the storage that a pointer block names; raises where an active one is outside."""
    argument, size = pointer.argument, itemsize(pointer.dtype.element_ty)
    places, off = np.divmod(pointer.data, size)
    bad = (places < 0) | (places >= argument.bytes.size // size) | (off != 0)
    if active is not None:
        bad &= active
    if bad.any():
        at = np.unravel_index(int(np.argmax(bad)), bad.shape) if bad.ndim else ()
        element = (int(pointer.data[at]) - argument.start) / size
        raise OutOfBoundsError(
            f"{what} at {line()}: element {element:g} of argument {argument.name} ({pointer.dtype.element_ty}"
            f"{argument.shape}, storage of {argument.bytes.size} bytes) is outside its storage"
            f"{f', at {tuple(map(int, at))} of the block {pointer.shape}' if at else ''}"
        )
    return places if active is None else np.where(active, places, 0)


def _mask(pointer: Block, mask, what: str):
    """(pointer, active elements, layout) with the mask broadcast to the pointer's block."""
    if mask is None:
        return pointer, None, pointer.layout
    mask = values.as_block(mask)
    if mask.dtype.name != "int1":
        raise ValueError(f"the mask of a {what} must be boolean, got {mask.dtype}")
    data, active, layout = values.broadcast(pointer, mask, f"the mask of a {what}")
    data, active = np.broadcast_arrays(data, active)
    return pointer.like(data, layout), active, layout


def _pointer(pointer, what: str) -> Pointer:
    if not isinstance(pointer, Pointer):
        raise TypeError(f"{what} takes a pointer, got {type(pointer).__name__}")
    return pointer


def read(pointer: Pointer, active: np.ndarray | None, what: str) -> np.ndarray:
    """Bits of the active elements; zero elsewhere."""
    places = _places(pointer, active, what)
    bits = pointer.argument.elements(itemsize(pointer.dtype.element_ty))
    if bits.size == 0:
        return np.zeros(places.shape, bits.dtype)
    found = np.asarray(bits[places])
    return found if active is None else np.where(active, found, np.zeros((), bits.dtype))


def load(pointer, mask=None, other=None, **hints) -> Block:
    """``gl.load``. Masked elements without ``other`` hold 0xFF bytes: nobody may use them."""
    pointer, active, layout = _mask(_pointer(pointer, "load"), mask, "load")
    here().machine.step()
    element = pointer.dtype.element_ty
    bits = read(pointer, active, "load")
    if active is not None and other is None:
        bits = np.where(active, bits, ~np.zeros((), bits.dtype))
    data = decode(np.asarray(bits), element)
    if active is not None and other is not None:
        other = values.as_block(other)
        layouts.agree(layout, other.layout, "load") if other.data.ndim else None
        data = np.where(active, data, np.broadcast_to(values.cast(other, element), data.shape))
    return Block(np.asarray(data), element, layout)


def store(pointer, value, mask=None, **hints) -> None:
    """``gl.store``."""
    pointer, active, layout = _mask(_pointer(pointer, "store"), mask, "store")
    value, element = values.as_block(value), pointer.dtype.element_ty
    if value.data.ndim:
        layouts.agree(layout, value.layout, "store")
        if value.data.ndim != pointer.data.ndim:
            raise ValueError(f"a block {value.shape} is stored through pointers {pointer.shape}")
    here().machine.step()
    places = _places(pointer, active, "store")
    bits = np.broadcast_to(encode(values.cast(value, element), element), places.shape)
    target = pointer.argument.elements(itemsize(element))
    if active is not None:
        places, bits = places[active], bits[active]
    if places.size:
        target[places] = bits


class Descriptor:
    """A TMA descriptor in a kernel: boxes of a tensor. What lies outside the tensor is read as zeros (or NaN, by its
    padding) and not written; the copied bytes are counted in full."""

    def __init__(self, argument: Argument, start: int, shape, strides, block_shape, layout, padding="zero"):
        self.argument, self.layout, self.padding = argument, layout, padding
        self.shape, self.strides, self.block_shape = list(shape), list(strides), [int(size) for size in block_shape]
        self.dtype = argument.element
        size = itemsize(self.dtype)
        last = sum((int(length) - 1) * int(stride) for length, stride in zip(self.shape, self.strides))
        elements = argument.elements(size)
        if start % size or not 0 <= start // size <= start // size + last < max(1, elements.size):
            raise OutOfBoundsError(
                f"a descriptor of {self.shape}, strides {self.strides}, exceeds the storage of argument {argument.name}"
            )
        self.view = np.lib.stride_tricks.as_strided(
            elements[start // size :], [int(n) for n in self.shape], [int(n) * size for n in self.strides]
        )
        self.nbytes_per_cta = int(np.prod(self.block_shape)) * size

    @classmethod
    def of(cls, name: str, descriptor) -> "Descriptor":
        """Of the host's ``TensorDescriptor``."""
        if getattr(descriptor, "mode", "tiled") != "tiled":
            raise NotImplementedError(f"argument {name}: TMA descriptors of mode {descriptor.mode} are not emulated")
        argument = Argument(name, descriptor.base)
        return cls(
            argument, argument.start, descriptor.shape, descriptor.strides, descriptor.block_shape, descriptor.layout,
            descriptor.padding,
        )  # fmt: skip

    @property
    def block_type(self):
        return values.BlockType(self.dtype, self.block_shape, self.layout)

    def _window(self, corner):
        """(slices of the tensor, slices of the box) of what a box at ``corner`` has inside the tensor."""
        inside, into = [], []
        for at, size, length in zip(corner, self.block_shape, self.view.shape):
            low, high = max(0, at), min(length, at + size)
            high = max(low, high)
            inside.append(slice(low, high))
            into.append(slice(low - at, high - at))
        return tuple(inside), tuple(into)

    def read(self, corner: list[int]) -> np.ndarray:
        inside, into = self._window(corner)
        fill = encode(np.full((), np.nan, np.float32), self.dtype) if self.padding == "nan" else 0
        box = np.full(self.block_shape, fill, self.view.dtype)
        box[into] = self.view[inside]
        return box

    def write(self, corner: list[int], box: np.ndarray) -> None:
        inside, into = self._window(corner)
        self.view[inside] = box[into]
