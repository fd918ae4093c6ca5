"""Host time of a launch: ours beside Triton's own, in a process whose CUDA driver is a stub that does nothing.

``python -m bench.launch_cost`` prints one JSON object: microseconds a launch of a kernel with 40 arguments (24 at run
time, 16 constants), the best of interleaved rounds. Triton's JIT, its C launcher and ours are the real ones. Started by
``bench/test_launch.py``, which builds the stub and points TRITON_LIBCUDA_PATH at it.
"""

import json
import time

import torch
import triton
import triton.language as tl

import tests.launch.cuda_recorder  # noqa: F401  (puts the stub driver under Triton)
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of, on_cpu

POINTERS, INTEGERS, CONSTANTS = 8, 16, 16
CALLS, ROUNDS = 40, 200


@triton.jit
def forty_argument_kernel(
    p0, p1, p2, p3, p4, p5, p6, p7,
    i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    C4: tl.constexpr, C5: tl.constexpr, C6: tl.constexpr, C7: tl.constexpr,
    C8: tl.constexpr, C9: tl.constexpr, C10: tl.constexpr, C11: tl.constexpr,
    C12: tl.constexpr, C13: tl.constexpr, C14: tl.constexpr, C15: tl.constexpr,
):  # fmt: skip
    """Copies 64 values; what it computes does not matter."""
    tl.store(p0 + tl.arange(0, C0), tl.load(p1 + tl.arange(0, C0)))


FORTY = Kernel(
    forty_argument_kernel,
    arguments={f"p{i}": "*T" for i in range(POINTERS)} | {f"i{i}": "i32" for i in range(INTEGERS)},
    statics=tuple(f"C{i}" for i in range(CONSTANTS)),
    tiles={"num_warps": (4,), "num_stages": (2,)},
    rule=lambda chip, dtype, statics, sizes: {"num_warps": 4, "num_stages": 2},
    memory=lambda chip, dtype, statics, tile: {},
    cost=lambda dtype, statics, sizes: Cost(0, 0),
    work=lambda dtype, statics, sizes, tile: Work(1, 0, 0),
    cases=(Case("only", {f"C{i}": 64 for i in range(CONSTANTS)}, {"rows": 1}),),
    uses_dot=False,
)


def measure() -> dict[str, float]:
    """Microseconds a launch, by contestant."""
    tensors = [torch.empty(1024, dtype=torch.bfloat16) for _ in range(POINTERS)]
    args = (*tensors, *range(16, 16 + 16 * INTEGERS, 16))
    statics, sizes, chip = FORTY.cases[0].statics, FORTY.cases[0].sizes, chip_of(tensors[0].device)
    tile = FORTY.tile_for(chip, "bf16", statics, sizes)
    constants = FORTY.constexprs(statics, tile)
    contestants = {
        "mla_kernels": lambda: FORTY.launch(chip, 128, args, statics, tile),
        "mla_kernels, tile looked up": lambda: FORTY.launch(
            chip, 128, args, statics, FORTY.tile_for(chip, "bf16", statics, sizes)
        ),
        "triton": lambda: forty_argument_kernel[(128,)](*args, **constants, num_warps=4, num_stages=2),
        "tile lookup": lambda: FORTY.tile_for(chip, "bf16", statics, sizes),
        "empty call": lambda: None,
    }
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            call()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return best


if __name__ == "__main__":
    with on_cpu("cuda", "sm_90"):
        print(json.dumps(measure()))
