"""A kernel of the tests' own, its problems, and a compiler that is none."""

from mla_kernels import launch
from mla_kernels.launch import Case, Cost, Kernel, Work
from mla_kernels.targets.report import Report
from mla_kernels.targets.service import OutOfTime
from mla_kernels.tiles import Problem
from tests.test_launch import scale_kernel

CASE = Case("small", {}, {"rows": 1 << 20})


def declare(**changes) -> Kernel:
    """A declaration that is not among the package's."""
    declaration = dict(
        arguments={"x_ptr": "*T", "y_ptr": "*T", "size": "i32", "factor": "fp32"},
        statics=(),
        tiles={"BLOCK": (64, 1024, 65536, 1 << 20), "num_warps": (4, 8)},
        rule=lambda chip, dtype, statics, sizes: {"BLOCK": 64, "num_warps": 4},
        memory=lambda chip, dtype, statics, tile: {"shared" if chip.is_gpu else "UB": 4 * tile["BLOCK"]},
        cost=lambda dtype, statics, sizes: Cost(sizes["rows"], 8 * sizes["rows"]),
        work=lambda dtype, statics, sizes, tile: Work(
            -(-sizes["rows"] // tile["BLOCK"]), tile["BLOCK"], 8 * tile["BLOCK"]
        ),
        cases=(CASE,),
        uses_dot=False,
    )
    try:
        return Kernel(scale_kernel, **(declaration | changes))
    finally:
        launch.KERNELS.pop("scale_kernel", None)


def problem(kernel: Kernel, **sizes: int) -> Problem:
    return Problem(kernel, "fp32", {}, sizes or dict(CASE.sizes))


def report(kernel, chip, dtype, tile, **changes) -> Report:
    fields = dict(target=chip.name, kernel=kernel.name, dtype=dtype, case="", tile=dict(tile), compiled=True, reason="")
    counts = dict(registers=32, spills=0, loop_spills=0, memory={}, limits=chip.memory, traps=0, tensor_instructions=0)
    return Report(**(fields | counts | {"detail": {}} | changes))


class Clock:
    """Stands in for the module ``time``: a compilation takes a second, all else nothing."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Compiler:
    """Stands in for ``compile_many``; ``fails`` and ``changes`` say what it makes of a tile, ``clock`` whether there is
    time for it."""

    def __init__(self):
        self.tiles, self.kernels = [], []
        self.clock = None
        self.fails = lambda tile: False
        self.changes = lambda tile: {}

    def __call__(self, requests, progress=None, seconds=None):
        reports, begin = [], self.clock.now if self.clock else 0.0
        for request in requests:
            if self.clock:
                self.clock.now += 1.0
                if seconds is not None and self.clock.now - begin > seconds:
                    raise OutOfTime
            self.tiles.append(dict(request.tile))
            self.kernels.append(request.kernel.name)
            bad = self.fails(request.tile)
            changes = {"compiled": not bad, "reason": "it overflows" if bad else ""} | self.changes(request.tile)
            reports.append(report(request.kernel, request.chip, request.dtype, request.tile, **changes))
            if progress is not None:
                progress(reports[-1])
        return reports
