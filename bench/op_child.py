"""One side of bench/op.py: the ops of one tree, prepared and timed on request. A JSON object a line in, one out."""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import compare
import op_cases
import torch

import mla_kernels

COLD_BYTES = 1 << 29
"""Written before each call on a GPU: no L2 is larger, and the host is done launching when it ends."""


class Timer:
    """Seconds of a call: wall time on the CPU; on a GPU CUDA events, each call with a cold L2."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            self.cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run, calls: int) -> float:
        """The mean of this many calls."""
        if self.device == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - begin) / calls
        total = 0.0
        for _ in range(calls):
            self.cold.zero_()
            self.start.record()
            run()
            self.end.record()
            self.end.synchronize()
            total += self.start.elapsed_time(self.end) * 1e-3
        return total / calls


def prepare(name: str, case: str, device: str, path: str):
    """A case's call; its result is saved under ``path``."""
    torch.manual_seed(0)
    chosen = op_cases.OPS[name]
    run = chosen.build(op_cases.Make(device), **chosen.cases[case])
    torch.save([tensor.detach().cpu() for tensor in run()], path)
    return run


def about(device: str) -> dict:
    """The machine and the versions that a figure stands beside."""
    parts = [compare.machine()]
    if device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    try:
        parts.append(f"triton {version('triton')}")
    except PackageNotFoundError:
        parts.append("no triton")
    return {"machine": ", ".join(parts)}


def main(tree: str, device: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if not Path(mla_kernels.__file__).resolve().is_relative_to(Path(tree).resolve()):
        raise RuntimeError(f"mla_kernels comes from {mla_kernels.__file__}, not from {tree}")
    timer = run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "path" in request:
                run = None  # its memory is free before the next takes its own
                run = prepare(request["op"], request["case"], device, request["path"])
                answer = {}
            elif "calls" in request:
                answer = {"seconds": timer(run, request["calls"])}
            else:
                timer, answer = Timer(device), about(device)
        except Exception as error:  # the other side has to hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
