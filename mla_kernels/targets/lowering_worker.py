"""Ascend compile worker for bundles: as ascend_worker.py, but that a job says what Triton's JIT found of arguments.

A job's ``attributes`` {"tt.divisibility": [positions], "tt.equal_to": [positions]} enter the IR as in a launch; the
answer's ``seconds`` are those of the front end and of the open compiler.
"""

import functools
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


if __name__ == "__main__":
    ascend_worker.main(lower)
