"""Build a bundle: collect what a model launches, compile it, write files and manifest."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mla_kernels.autotune import models
from mla_kernels.autotune.problems import QUANTISED, names_of
from mla_kernels.bundle import manifest
from mla_kernels.bundling import ascend, gpu, launches, offline
from mla_kernels.bundling.gpu import Failed
from mla_kernels.bundling.steps import CACHES, PLAIN, Limits, Step, default_caches, steps
from mla_kernels.language import HAS_TRITON, INTERPRET
from mla_kernels.launch import DTYPE_NAMES
from mla_kernels.targets import devices
from mla_kernels.targets.chips import Chip


@dataclass(frozen=True)
class Order:
    """What to build; names as a user gives them.

    Args:
        model: a known model or a ``config.json``; see :func:`mla_kernels.autotune.models.geometry`.
        target: a device ("h100") or a compile target ("sm_90": the device that stands for it).
        tp: devices that share the model.
        dtype: "bf16", "fp16" or "fp32".
        formats: of experts' weights: a name of ``WeightFormat``, or ``dtype`` for weights as they are. None: that, and
            the model's published ones.
        caches: layouts of the latent cache, "plain" for ``dtype``. None: what the model is served with.
        only: prefixes of the steps that are taken, "mla_decode" or "MoE"; empty: all.

    Raises:
        ValueError: an unknown name, with the accepted ones; sizes that ``tp`` does not divide.
    """

    model: str
    target: str
    tp: int = 1
    dtype: str = "bf16"
    formats: tuple[str, ...] | None = None
    caches: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    only: tuple[str, ...] = ()

    def __post_init__(self):
        accepted = tuple(DTYPE_NAMES.values())
        if self.dtype not in accepted:
            raise ValueError(f"dtype: got {self.dtype!r}, accepted are {', '.join(accepted)}")
        if type(self.tp) is not int or self.tp < 1:
            raise ValueError(f"tp: got {self.tp!r}, an integer from 1 is accepted")
        for name, accepted in (("formats", (self.dtype, PLAIN, *QUANTISED)), ("caches", CACHES)):
            for value in getattr(self, name) or ():
                if value not in accepted:
                    raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")
        _ = self.chip, self.geometry

    @property
    def chip(self) -> Chip:
        return devices.device(self.target)

    @property
    def geometry(self) -> models.Geometry:
        """Of one device's share."""
        return models.geometry(self.model).on(self.tp)

    @property
    def plain_formats(self) -> tuple[str, ...]:
        """The formats, "plain" first where it is among them."""
        named = (PLAIN, *self.geometry.formats) if self.formats is None else self.formats
        return tuple(dict.fromkeys(PLAIN if name == self.dtype else name for name in named))

    @property
    def layouts(self) -> tuple[str, ...]:
        return default_caches(self.geometry) if self.caches is None else self.caches


def build(order: Order, folder: Path, *, jobs: int | None = None, say: Callable[[str], None] = print) -> dict:
    """Write the bundle of ``order`` into ``folder``, which it replaces if that is a bundle; returns the manifest.

    Raises:
        Failed: Triton is missing or interprets, the folder is something else, or a kernel does not compile.
        mla_kernels.targets.service.ToolchainMissing: the compilers of Ascend are not installed.
    """
    chosen = _steps(order)
    if folder.exists() and not (folder.is_dir() and (manifest.is_bundle(folder) or not any(folder.iterdir()))):
        raise Failed(f"{folder} is there and is no bundle: name another folder, or an empty one")
    if folder.is_mount():
        raise Failed(f"{folder} is a mount point, and a bundle replaces its folder: name a folder in it")
    if not HAS_TRITON:
        raise Failed("the package triton is not installed: pip install triton")
    if INTERPRET:
        raise Failed("TRITON_INTERPRET is set, and nothing is compiled: unset it")
    began = time.monotonic()
    chip, half = order.chip, folder.with_name(f".{folder.name}.{os.getpid()}.half")  # two builds may run at once
    try:
        half.mkdir(parents=True)
    except OSError as error:
        raise Failed(f"{folder} cannot be written: {error.strerror}") from error
    try:
        made = _manifest(order, chosen, half, jobs or gpu.jobs_here(), say)
        made["seconds"] = round(time.monotonic() - began, 1)
        manifest.write(half, made)
        shutil.rmtree(folder, ignore_errors=True)
        half.replace(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(
        f"{folder}: {len(made['kernels'])} kernels for {chip.part}, {size / 1e6:.1f} MB, in {made['seconds']:.0f} s "
        f"({sum(entry['seconds'] for entry in made['kernels']):.0f} s of compiling)"
    )
    return made


def _steps(order: Order) -> list[Step]:
    """The chosen steps. ValueError where ``only`` has a name of none."""
    g, dtype = order.geometry, names_of(order.dtype)
    chosen = list(steps(g, dtype, order.limits, formats=order.plain_formats, caches=order.layouts))
    if order.only:
        names = [step.name for step in chosen]
        for prefix in order.only:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"only: got {prefix!r}, steps of {g.name} are {'; '.join(names)}")
        chosen = [step for step in chosen if step.name.startswith(order.only)]
    return chosen


def _manifest(order: Order, chosen: list[Step], half: Path, jobs: int, say) -> dict:
    chip, g = order.chip, order.geometry
    say(f"{g.name}, tensor-parallel {order.tp}, for {chip.part}: {sum(len(s.sizes) for s in chosen)} calls")
    if chip.is_gpu:
        offline.pose(chip)
        wanted, refused = launches.gpu_launches(chosen, chip)
        say(f"{len(wanted)} kernels to compile, {jobs} at a time")
        kernels = gpu.compile_all(wanted, chip.device, half, jobs, say)
        toolchain, target = _gpu_toolchain(chip), offline.target_of(chip)
        backend, architecture = target.backend, str(target.arch)
    else:
        wanted, refused = ascend.launches(chosen, chip)
        say(f"{len(wanted)} kernels to compile, as far as the open stages go")
        kernels = ascend.compile_all(wanted, chip, half, jobs, say)
        toolchain, backend, architecture = ascend.toolchain(), "npu", chip.architecture
    for name, reason in refused.items():
        say(f"left out: {name}: {reason}")
    used = {entry["kernel"]: one.kernel for entry, one in zip(kernels, wanted)}
    return {
        "format": manifest.FORMAT,
        "mla_kernels": manifest.package_version(),
        "model": {"name": g.name, "tp": order.tp, "dtype": order.dtype, "formats": order.plain_formats,
                  "caches": order.layouts},
        "target": {"device": chip.device, "part": chip.part, "chip": chip.name, "vendor": chip.vendor,
                   "backend": backend, "architecture": architecture},
        "toolchain": toolchain,
        "covers": {**asdict(order.limits), "steps": {step.name: len(step.sizes) for step in chosen}},
        "left out": refused,
        "sources": {name: _source(kernel, chip) for name, kernel in sorted(used.items())},
        "kernels": kernels,
    }  # fmt: skip


def _source(kernel, chip: Chip) -> dict[str, str]:
    made = {"hash": kernel.source_hash}
    return made | {"triton": manifest.triton_source(kernel)} if chip.is_gpu else made


def _gpu_toolchain(chip: Chip) -> dict:
    from triton.compiler.compiler import make_backend

    return {
        "triton": manifest.triton_version(),
        "digest": manifest.compiler_digest(),
        "settings": manifest.compiler_settings(),
        "backend": str(make_backend(offline.target_of(chip)).hash()).strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def names(text: str) -> tuple[str, ...]:
    """The parts of "bf16,fp8_block"."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def numbers(name: str, text: str) -> tuple[int, ...]:
    """The parts of "1,2" as integers; ValueError names the argument, and a part that is none."""
    found = []
    for part in names(text):
        if not part.isdecimal():
            raise ValueError(f"{name}: got {part!r}, integers from 1 with commas between them are accepted")
        found.append(int(part))
    return tuple(found)
