"""Copies of tensors between inaccessible pages, and calls in a child process: an out-of-bounds access becomes an error.

A copy either ends right at inaccessible memory (catches what runs past the end) or starts right after it (catches what
runs before the start). The copies lie in shared memory, so that what a forked child writes is seen by its parent.
"""

import ctypes
import faulthandler
import mmap
import os
import resource
import warnings
from collections.abc import Callable

import torch

GUARD_BYTES = 1 << 28  # address space only, on each side
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(address: int | None, size: int, protection: int, flags: int) -> int:
    mapped = _libc.mmap(address, size, protection, flags, -1, 0)
    if mapped == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes for guard pages failed")
    return mapped


class _Region:
    """``size`` bytes of shared memory at one edge of a mapping, with inaccessible memory on both sides of it."""

    def __init__(self, size: int, side: str):
        self.size = size
        body = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.reserved = body + 2 * GUARD_BYTES
        self.base = _map(None, self.reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        start = self.base + GUARD_BYTES
        if body:
            _map(start, body, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_FIXED)
        self.address = start if side == "start" else start + body - size

    def distance(self, address: int) -> int | None:
        """Bytes from the tensor's edge to an address in the mapping: negative before it, None elsewhere."""
        if not self.base <= address < self.base + self.reserved:
            return None
        return address - self.address if address < self.address else address - (self.address + self.size)

    def close(self) -> None:
        _libc.munmap(self.base, self.reserved)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the byte after its last, as its strides reach."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return start, start + (last + 1) * tensor.element_size()


class GuardedCopies:
    """Copies of the tensors among ``args``; views of one storage stay views of one copy.

    Within the block, ``addresses`` holds for each argument its copy's address (None for what is no tensor).
    """

    def __init__(self, args: tuple, side: str):
        self.args, self.side = args, side
        self.addresses: list[int | None] = []
        self._regions: dict[int, tuple[_Region, int]] = {}  # storage -> region, first byte of the original

    def __enter__(self) -> "GuardedCopies":
        extents: dict[int, tuple[int, int]] = {}
        for position, arg in self._tensors():
            start, end = _extent(arg)
            before = extents.get(self._storage(position), (start, end))
            extents[self._storage(position)] = min(start, before[0]), max(end, before[1])
        for storage, (start, end) in extents.items():
            region = _Region(end - start, self.side)
            self._regions[storage] = region, start
            ctypes.memmove(region.address, start, end - start)
        self.addresses = [None] * len(self.args)
        for position, arg in self._tensors():
            region, start = self._regions[self._storage(position)]
            self.addresses[position] = arg.data_ptr() - start + region.address
        return self

    def __exit__(self, *exception) -> None:
        for region, _ in self._regions.values():
            region.close()

    def _tensors(self) -> list[tuple[int, torch.Tensor]]:
        return [(position, arg) for position, arg in enumerate(self.args) if isinstance(arg, torch.Tensor)]

    def _storage(self, position: int) -> int:
        tensor = self.args[position]
        if tensor.numel() == 0:  # of the address 0, views of a storage among them
            return -position - 1
        return tensor.untyped_storage().data_ptr()

    def copy_back(self) -> None:
        """Write what the copies hold into the tensors."""
        for region, start in self._regions.values():
            ctypes.memmove(start, region.address, region.size)

    def locate(self, address: int) -> tuple[int, int] | None:
        """Which argument lies nearest an inaccessible address, and how many bytes outside it the address is."""
        for position, _ in self._tensors():
            region, _ = self._regions[self._storage(position)]
            distance = region.distance(address)
            if distance is not None:
                return position, distance
        return None


class SharedInteger:
    """A number that a forked child can set: at ``address`` for native code, as ``value`` for its parent."""

    def __enter__(self) -> "SharedInteger":
        self._region = _Region(8, "start")
        self.address = self._region.address
        return self

    def __exit__(self, *exception) -> None:
        self._region.close()

    @property
    def value(self) -> int:
        return ctypes.c_uint64.from_address(self.address).value


def call_in_child(call: Callable[[], None]) -> tuple[int, int]:
    """Run ``call`` in a forked child: its exit status (1 where ``call`` raised) and the signal that killed it, or 0.

    ``call`` must stay in native code: other threads do not exist in the child, and their locks may be held.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: see above
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    return (0, os.WTERMSIG(ended)) if os.WIFSIGNALED(ended) else (os.WEXITSTATUS(ended), 0)
