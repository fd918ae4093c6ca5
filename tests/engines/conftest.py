"""Tests inside vLLM itself, in an environment of their own: ``make test-engines``.

vLLM's package for CUDA is installed, and there is no GPU: a library of four functions stands in for the driver's, so
that its extension can be loaded, and the platform is told which capability to name. Tensors are CPU tensors, vLLM's
Triton kernels run in the interpreter, and this library's ops take their CPU code.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

FUNCTIONS = ("cuInit", "cuGetProcAddress_v2", "cuPointerGetAttribute", "cuTensorMapEncodeTiled")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE

os.environ.update({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "INFO"})


def load_driver() -> None:
    """Load a ``libcuda.so.1`` that knows no device, under whose name others find it."""
    folder = Path(tempfile.mkdtemp())
    source = folder / "no_device.c"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in FUNCTIONS))
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_driver()
