"""``python -m tests.launch.eager_calls OP ...`` prints as JSON which Python functions an eager call of each op runs.

Built-ins aside, launches included: Triton's own C launcher starts the kernels, over the stub driver that
tests/launch/test_eager_calls.py points to. Counted is a call like one before, with gradients recorded and none wanted.
"""

import json
import sys
from collections.abc import Callable, Iterator

import tests.launch.cuda_recorder  # noqa: F401  (puts the stub driver under Triton)
from bench import op_cases
from mla_kernels.launch import on_cpu

SMALL = {"HIDDEN": 256, "INNER": 128, "EXPERTS": 8}  # the count is the same at every size


def functions(run) -> list[str]:
    """Names of the Python functions that ``run()`` runs, itself aside, in order."""
    names = []

    def seen(frame, event, argument):
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names[1:]


def small_calls(ops: list[str]) -> Iterator[tuple[str, Callable]]:
    """Name and call of each op's cases of one token, or of its first case, on CPU tensors."""
    vars(op_cases).update(SMALL)
    for op in ops:
        every = list(op_cases.OPS[op].cases.items())
        for name, sizes in [case for case in every if case[1].get("tokens") == 1] or every[:1]:
            yield f"{op} {name}", op_cases.OPS[op].build(op_cases.Make("cpu"), **sizes)


def main(ops: list[str]) -> dict[str, list[str]]:
    counted = {}
    for name, run in small_calls(ops):
        with on_cpu("cuda", "sm_90"):
            run()
            counted[name] = functions(run)
    return counted


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
