"""Ascend compile worker for bundles: as ascend_worker.py, but that a job says what Triton's JIT found of arguments.

A job's ``attributes`` {"tt.divisibility": [positions], "tt.equal_to": [positions]} enter the IR as in a launch; the
answer's ``seconds`` are those of the front end and of the open compiler.
"""

import functools
import json
import os
import sys
import time

import ascend_worker
from triton.backends.ascend.compiler import AscendAttrsDescriptor
from triton.compiler import ASTSource


def lower(job: dict) -> dict:
    """Answer of a job of the action ``report``."""
    attributes = AscendAttrsDescriptor.from_dict({"arg_properties": job["attributes"], "cls": "AscendAttrsDescriptor"})
    ascend_worker.ASTSource = functools.partial(ASTSource, attrs=attributes)
    began = time.perf_counter()
    return ascend_worker.answer(job) | {"seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compilers print must not mix with the answers
    for line in sys.stdin:
        if line.strip():
            channel.write(json.dumps(lower(json.loads(line))) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
