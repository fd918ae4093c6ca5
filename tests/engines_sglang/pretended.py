"""SGLang's CUDA platform without a GPU: a driver that knows no device, and a capability that is told.

To be imported, and :func:`pretend` called, before anything of SGLang. SGLang asks ``torch.cuda`` for the chip when its
modules are imported, so that a process has one capability. Tensors that are asked for on ``cuda`` are CPU tensors.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

FUNCTIONS = ("cuInit", "cuGetProcAddress_v2", "cuPointerGetAttribute", "cuTensorMapEncodeTiled")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
CORES, MEMORY = 108, 80 << 30

os.environ |= {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "9",  # there is none; SGLang reads a number
    "SGLANG_FORCE_FUSED_OP_BACKEND": "torch",  # norms, activations, rope in SGLang's own reference form
}


def load_driver() -> None:
    """Load a ``libcuda.so.1``, so that extensions find the functions that they name."""
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "no_device.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in FUNCTIONS))
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class OnCPU(TorchFunctionMode):
    """Where a call names the device ``cuda``, it gets ``cpu``."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _named(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function in (torch.Tensor.to, torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_full):
            args = tuple("cpu" if _named(arg) else arg for arg in args)
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        return function(*args, **kwargs)


class Event:
    """Of work that is done when it is asked for."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def query(self):
        return True

    wait = synchronize = record


class Stream:
    """The one stream there is."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or Event()

    wait_event = wait_stream


def _named(device) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def pretend(major: int, minor: int) -> None:
    """Make ``torch.cuda`` a chip of that capability, whose tensors are CPU tensors."""
    load_driver()
    properties = SimpleNamespace(
        name=f"capability {major}.{minor}", major=major, minor=minor, total_memory=MEMORY, multi_processor_count=CORES,
        shared_memory_per_block_optin=101376, warp_size=32, uuid="0", regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536, L2_cache_size=40 << 20, is_integrated=False,
    )  # fmt: skip
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "manual_seed_all": lambda seed: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    OnCPU().__enter__()
