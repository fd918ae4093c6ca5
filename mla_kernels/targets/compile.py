"""Compile declared kernels for any target without its device, in parallel worker processes, with cached reports."""

import functools
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import TimeoutError, as_completed
from pathlib import Path
from typing import NamedTuple

from mla_kernels.language import HAS_TRITON, TRITON_VERSION, triton
from mla_kernels.targets import service
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.report import Report

HERE = Path(__file__).parent
_WORKER_FILES = {
    "gpu": ("gpu_worker.py", "amdgcn.py", "bounds.py", "loops.py", "ptx.py", "sass.py"),
    "ascend": ("ascend_worker.py",),
}
_ASCEND_PACKAGES = ("triton-ascend", "ascendnpu-ir")


class Request(NamedTuple):
    """One compilation: a declared kernel for a chip. ``case`` only labels the report."""

    kernel: "object"  # a launch.Kernel; launch imports targets, not the other way round
    chip: Chip
    dtype: str
    statics: Mapping
    tile: Mapping[str, int]
    case: str = ""


def compile_kernel(kernel, chip: Chip, dtype: str, statics: Mapping, tile: Mapping[str, int], case: str = "") -> Report:
    """Compile ``kernel`` for ``chip`` and report. See :func:`compile_many`."""
    return compile_many([Request(kernel, chip, dtype, statics, tile, case)])[0]


def compile_many(
    requests: Iterable[Request], progress: Callable[[Report], None] | None = None, seconds: float | None = None
) -> list[Report]:
    """Reports in the order of ``requests`` (tuples in the order of :class:`Request` do).

    Equal jobs are compiled once. ``progress`` is called, in this thread, with every report as it comes. Reports are
    kept under :func:`mla_kernels.targets.service.cache_folder` by everything that they depend on. After ``seconds`` the
    compilers are stopped; what they had finished is kept.

    Raises:
        mla_kernels.targets.service.ToolchainMissing: a compiler that is needed is not installed.
        mla_kernels.targets.service.OutOfTime: ``seconds`` have passed.
    """
    requests = [Request(*request) for request in requests]
    reports: list[Report | None] = [None] * len(requests)
    waiting: dict[str, list[int]] = {}
    jobs: dict[str, tuple[str, dict]] = {}

    def finish(index: int, answer: dict) -> None:
        reports[index] = _report(requests[index], answer)
        if progress is not None:
            progress(reports[index])

    for index, request in enumerate(requests):
        if request.chip.name in request.kernel.unsupported:
            reason = request.kernel.unsupported[request.chip.name]
            finish(index, {"ok": False, "reason": reason, "unsupported": True})
            continue
        compiler_of(request.chip)
        kind, job = _job(request)
        key = _key(kind, job)
        kept = _kept(key)
        if kept is not None:
            finish(index, kept)
        else:
            jobs[key] = kind, job
            waiting.setdefault(key, []).append(index)

    futures = {service.pool().submit(kind, job): key for key, (kind, job) in jobs.items()}
    try:
        for future in as_completed(futures, timeout=seconds):
            key, answer = futures[future], future.result()
            _keep(key, answer)
            for index in waiting[key]:
                finish(index, answer)
    except TimeoutError as error:
        raise service.OutOfTime(f"compilers were stopped after {seconds:.0f} s") from error
    finally:
        if not all([future.done() or future.cancel() for future in futures]):
            service.pool().stop()
    return reports


def write_artefacts(request: Request, prefix: Path) -> Report:
    """Compile anew and leave the artefacts as ``<prefix>.ptx``, ``.sass``, ``.amdgcn``, ``.mlir``, ...; not cached."""
    if request.chip.name in request.kernel.unsupported:
        return compile_many([request])[0]
    kind, job = _job(request)
    compiler_of(request.chip)  # says which toolchain is missing
    prefix.parent.mkdir(parents=True, exist_ok=True)
    answer = service.pool().submit(kind, job | {"output": str(prefix.absolute())}).result()
    return _report(request, answer)


@functools.cache
def compiler_version(kind: str) -> str:
    """Versions of the compilers behind ``kind`` ("gpu" or "ascend"); ToolchainMissing where there are none."""
    if kind == "gpu":
        if not HAS_TRITON:
            raise service.ToolchainMissing("no GPU toolchain: the package triton is not installed")
        return f"triton {triton.__version__}"
    code = (
        f"from importlib.metadata import version; print(*[n + ' ' + version(n) for n in {_ASCEND_PACKAGES}], sep=', ')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = service.ascend_python()
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise service.ToolchainMissing(
            f"{python} has not {' and '.join(_ASCEND_PACKAGES)}: {done.stderr.strip()[-200:]}"
        )
    return done.stdout.strip()


def compiler_of(chip: Chip) -> str:
    """:func:`compiler_version` of the compilers that build for ``chip``; ToolchainMissing also where they are too old
    for it."""
    version = compiler_version("gpu" if chip.is_gpu else "ascend")
    if chip.is_gpu and chip.readable_since > TRITON_VERSION:
        needed = ".".join(map(str, chip.readable_since))
        raise service.ToolchainMissing(
            f"no toolchain for {chip.name}: Triton {needed} or newer is needed, whose ptxas and cuobjdump know it; "
            f"installed is {version}"
        )
    return version


def buildable(chip: Chip) -> bool:
    """Whether the installed GPU compilers are new enough for ``chip``; an Ascend chip's are in another environment."""
    return not chip.is_gpu or (HAS_TRITON and chip.readable_since <= TRITON_VERSION)


@functools.cache
def _worker_sources(kind: str) -> str:
    return "".join((HERE / name).read_text() for name in _WORKER_FILES[kind])


def _job(request: Request) -> tuple[str, dict]:
    kernel, chip = request.kernel, request.chip
    return ("gpu" if chip.is_gpu else "ascend"), {
        "action": "report",
        "source": kernel.source,
        "function": kernel.name,
        "language": kernel.language,
        "signature": kernel.signature(request.dtype, request.statics),
        "constexprs": kernel.constexprs(request.statics, request.tile),
        "vendor": chip.vendor,
        "architecture": chip.architecture,
        "options": kernel.options(chip, request.tile),
    }


def _key(kind: str, job: dict) -> str:
    parts = (json.dumps(job, sort_keys=True), compiler_version(kind), _worker_sources(kind))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _path(key: str) -> Path:
    return service.cache_folder() / "reports" / f"{key}.json"


def _kept(key: str) -> dict | None:
    try:
        return json.loads(_path(key).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _keep(key: str, answer: dict) -> None:
    """Keep an answer; that of a process which died is not kept, for it may have died of a full memory."""
    if answer.get("crashed"):
        return
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    fresh.write_text(json.dumps(answer))
    fresh.replace(path)


def _report(request: Request, answer: dict) -> Report:
    detail = dict(answer.get("detail") or {})
    memory, registers = answer.get("memory") or {}, answer.get("registers")
    if answer["ok"] and request.chip.is_gpu:
        detail["resident"] = request.chip.resident(registers, memory["shared"], detail["warps"])
    return Report(
        target=request.chip.name,
        kernel=request.kernel.name,
        dtype=request.dtype,
        case=request.case,
        tile=dict(request.tile),
        compiled=answer["ok"],
        reason=answer["reason"],
        unsupported=answer.get("unsupported", False),
        registers=registers,
        spills=answer.get("spills", 0),
        loop_spills=answer.get("loop_spills", 0),
        memory=memory,
        limits=request.chip.memory,
        traps=answer.get("traps", 0),
        tensor_instructions=answer.get("tensor_instructions", 0),
        detail=detail,
    )
