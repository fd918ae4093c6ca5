"""Host time of an eager call of every op, in a process whose CUDA driver is a stub that does nothing.

``python -m bench.eager_cost [OP ...]`` prints one JSON object: microseconds a call, the best of interleaved rounds.
Public function, checks, torch's dispatcher, launcher and Triton's C launcher are the real ones. Started by
``bench/test_launch.py``, which builds the stub and points TRITON_LIBCUDA_PATH at it.
"""

import json
import sys
import time

from bench.op_cases import OPS
from mla_kernels.launch import on_cpu
from tests.launch.eager_calls import small_calls

CALLS, ROUNDS = 50, 30


def measure(ops: list[str]) -> dict[str, float]:
    """Microseconds a call, by case."""
    runs = dict(small_calls(ops))
    best = dict.fromkeys(runs, float("inf"))
    with on_cpu("cuda", "sm_90"):
        for _ in range(ROUNDS):
            for name, run in runs.items():
                run()
                start = time.perf_counter()
                for _ in range(CALLS):
                    run()
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return best


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:] or [name for name in OPS if name != "convert_cache"])))
