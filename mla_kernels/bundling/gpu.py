"""Compile what a GPU launches, into Triton's cache, in processes of their own."""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from mla_kernels.bundle import manifest
from mla_kernels.bundling import offline
from mla_kernels.bundling.launches import Wanted
from mla_kernels.language import triton
from mla_kernels.launch import KERNELS
from mla_kernels.targets import devices

BINARIES = {"nvidia": "cubin", "amd": "hsaco"}


class Failed(RuntimeError):
    """A bundle that could not be built; the message says why."""


def compile_all(wanted: list[Wanted], device: str, folder: Path, jobs: int, say: Callable[[str], None]) -> list[dict]:
    """Entries of the manifest, in the order of ``wanted``; their files are written under ``folder``.

    Raises:
        Failed: the compiler refused a kernel; its tile and the compiler's words are named.
    """
    entries: list[dict | None] = [None] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i].kernel.name)  # kernels of one source in one process
    with tempfile.TemporaryDirectory(prefix="mla_kernels_build_") as cache:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _start, (device, cache)) as pool:
            futures = {pool.submit(_compile, wanted[i].kernel.name, wanted[i].specialisation): i for i in order}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    one = wanted[futures[future]]
                    try:
                        seconds, files = future.result()
                    except Exception as error:  # whatever a compiler raises
                        described = " ".join(f"{name}={value}" for name, value in one.tile.items())
                        raise Failed(f"{one.kernel.name} ({described}): {type(error).__name__}: {error}") from error
                    entries[futures[future]] = _entry(one, seconds, files, folder, device)
                    if done % 25 == 0 or done == len(wanted):
                        say(f"{done} of {len(wanted)} kernels compiled")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return entries


def _start(device: str, cache: str) -> None:
    """In a compiling process, before its first job."""
    offline.pose(devices.device(device))
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.store_binary_only = True


def _compile(kernel: str, specialisation: str) -> tuple[float, dict[str, str]]:
    """(seconds, paths of the files by name) of one kernel."""
    began = time.perf_counter()
    compiled = KERNELS[kernel].jit.preload(specialisation)
    return time.perf_counter() - began, {name: str(path) for name, path in compiled.metadata_group.items()}


def _entry(one: Wanted, seconds: float, files: dict[str, str], folder: Path, device: str) -> dict:
    kept, binary = {}, BINARIES[devices.device(device).vendor]
    key = Path(next(iter(files.values()))).parent.name
    target = folder / manifest.FOLDER / key
    target.mkdir(parents=True, exist_ok=True)
    for name, path in sorted(files.items()):
        if name.endswith((".json", f".{binary}")):
            shutil.copyfile(path, target / name)
            data = (target / name).read_bytes()
            kept[name] = {"sha256": manifest.digest(data), "bytes": len(data)}
    return {
        "kernel": one.kernel.name, "key": key, **one.described, "tile": one.tile, "used by": one.used_by,
        "seconds": round(seconds, 2), "files": kept,
    }  # fmt: skip


def jobs_here() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
