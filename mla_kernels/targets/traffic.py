"""Global-memory traffic and matrix work of a kernel, counted in Triton's interpreter.

``with Traffic() as traffic: op(...)`` counts the bytes that every launch in the block asks for: each address once per
load or store, masked lanes left out. Caches are not modelled, so the count is what the kernel requests, an upper bound
of what reaches device memory.
"""

from dataclasses import dataclass, field

import numpy as np

from mla_kernels.targets import interpreter

_METHODS = ("create_masked_load", "create_masked_store", "create_dot")


@dataclass
class Traffic:
    """Context manager that counts; use it in a process with ``TRITON_INTERPRET=1``.

    Attributes:
        loaded, stored: bytes requested by loads and by stores.
        flops: floating-point operations in ``tl.dot``, padding included.
        dots: shape (M, N, K) of each dot -> how often it ran.
    """

    loaded: int = 0
    stored: int = 0
    flops: int = 0
    dots: dict[tuple[int, int, int], int] = field(default_factory=dict)

    @property
    def requested(self) -> int:
        """Bytes loaded and stored."""
        return self.loaded + self.stored

    def __enter__(self):
        from triton.runtime.interpreter import InterpreterBuilder

        interpreter.prepare()
        self._before = {name: getattr(InterpreterBuilder, name) for name in (*_METHODS, *_atomics(InterpreterBuilder))}
        before = self._before

        def masked_load(builder, pointers, mask, *rest):
            self.loaded += _bytes(pointers, mask)
            return before["create_masked_load"](builder, pointers, mask, *rest)

        def masked_store(builder, pointers, value, mask, *rest):
            self.stored += _bytes(pointers, mask)
            return before["create_masked_store"](builder, pointers, value, mask, *rest)

        def dot(builder, a, b, *rest):
            m, k, n = *a.data.shape[-2:], b.data.shape[-1]
            batch = a.data.size // (m * k)
            self.flops += 2 * batch * m * n * k
            self.dots[m, n, k] = self.dots.get((m, n, k), 0) + batch
            return before["create_dot"](builder, a, b, *rest)

        def atomic(name):
            def counted(builder, *args):
                pointers = next(value for value in args if hasattr(value, "get_element_ty"))
                self.loaded += _bytes(pointers)
                self.stored += _bytes(pointers)
                return before[name](builder, *args)

            return counted

        # create_load and create_store call the masked forms
        InterpreterBuilder.create_masked_load = masked_load
        InterpreterBuilder.create_masked_store = masked_store
        InterpreterBuilder.create_dot = dot
        for name in _atomics(InterpreterBuilder):
            setattr(InterpreterBuilder, name, atomic(name))
        return self

    def __exit__(self, *exception):
        from triton.runtime.interpreter import InterpreterBuilder

        for name, method in self._before.items():
            setattr(InterpreterBuilder, name, method)


def _atomics(builder) -> list[str]:
    return [name for name in dir(builder) if name in ("create_atomic_rmw", "create_atomic_cas")]


def _bytes(pointers, mask=None) -> int:
    addresses = pointers.data
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    return np.unique(addresses).size * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
