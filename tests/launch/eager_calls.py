"""``python -m tests.launch.eager_calls OP ...`` prints as JSON which Python functions an eager call of each op runs.

Built-ins aside, launches included: Triton's own C launcher starts the kernels, over the stub driver that
tests/launch/test_eager_calls.py points to. Counted is a call like one before, with gradients recorded and none wanted.
"""

import json
import sys

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


def main(ops: list[str]) -> dict[str, list[str]]:
    vars(op_cases).update(SMALL)
    counted = {}
    for op in ops:
        every = op_cases.OPS[op].cases.items()
        chosen = [(name, sizes) for name, sizes in every if sizes.get("tokens") == 1] or list(every)[:1]
        for name, sizes in chosen:
            run = op_cases.OPS[op].build(op_cases.Make("cpu"), **sizes)
            with on_cpu("cuda", "sm_90"):
                run()
                counted[f"{op} {name}"] = functions(run)
    return counted


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
