"""Variants of ops for NVIDIA's Hopper (compute capability 9.0), in Gluon: TMA, wgmma and warp specialisation.

An op's launcher asks here whether its variant is launched in place of the portable kernel. By itself that is so only
for forms that ran right on a device: those in ``ran.json`` beside this file, each with card, date and versions. The
list is empty. A test or a benchmark asks for a variant by name::

    with mla_kernels.hopper.variants("force"):
        mla_kernels.mla_decode(...)
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.language import HAS_TRITON, TRITON_VERSION
from mla_kernels.targets.chips import CHIPS, Chip

MODES = ("listed", "force", "portable")
TRITON_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Versions whose Gluon the kernels are written for; earlier ones lack what they use."""

RAN = Path(__file__).parent / "ran.json"
"""Forms that ran right on a device: entries of kernel, source (its hash), form (constants that decide what is compiled,
and the dtype; not whether there are sinks, splits or lengths, nor how many experts), card, date, torch, triton. A
kernel whose source has changed since has not run."""

ELSEWHERE = {
    name: "unsupported because it is written in TMA and wgmma, which only compute capability 9.0 has"
    for name in CHIPS
    if name != "sm_90"
}
"""What a variant's declaration says of other targets."""

MODE: ContextVar[str] = ContextVar("hopper_variants", default="listed")
_launched: set[tuple[GluonKernel, frozenset]] = set()


@contextlib.contextmanager
def variants(mode: str) -> Iterator[None]:
    """Within the block, which kernel an op launches that has a variant for Hopper.

    A backward launches what its forward was asked to, wherever it is called. Not so one that ``torch.compile`` traced:
    it asks the thread it runs in, which on a GPU is autograd's own, where ``"listed"`` holds.

    Args:
        mode: ``"listed"`` (the default outside): the variant for forms that ran right on a device, else the portable
            kernel. ``"force"``: the variant; a launch that it cannot serve raises. ``"portable"``: the portable kernel.

    Raises:
        ValueError: another mode.
        NotImplementedError: (by an op, in mode "force") the variant does not exist for this chip, whose compute
            capability is named, for this version of Triton, or for this form of the call.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {', '.join(map(repr, MODES))}")
    token = MODE.set(mode)
    try:
        yield
    finally:
        MODE.reset(token)


def chosen(kernel: GluonKernel, chip: Chip, form: Mapping, refusal) -> bool:
    """Whether an op launches its variant ``kernel`` on ``chip``.

    ``form``: the constants that decide what is compiled, and the dtype. ``refusal()`` says why the variant does not
    serve this call, or nothing.

    Raises:
        NotImplementedError: it is asked for by name and does not serve the call.
    """
    mode = MODE.get()
    if mode == "portable" or (mode == "listed" and (chip.name in kernel.unsupported or not _listed())):
        return False
    return served(kernel, None, _missing(chip) or refusal()) and (mode == "force" or has_run(kernel, form))


def served(kernel: GluonKernel, form: frozenset | None, reason: str) -> bool:
    """Whether a call is launched whose ``form`` (None: not yet) was :func:`chosen`; ``reason``: why not, or nothing.

    Raises:
        NotImplementedError: it is not, and the variant is asked for by name.
    """
    if reason and MODE.get() == "force":
        raise NotImplementedError(f"{kernel.name}, asked for by hopper.variants('force'): {reason}")
    if form is not None and not reason:
        _launched.add((kernel, form))
    return not reason


@contextlib.contextmanager
def launches() -> Iterator[list[dict]]:
    """What variants are launched in the block, known at its end: each kernel, the hash of its source, and each form."""
    found: list[dict] = []
    _launched.clear()
    yield found
    for kernel, form in _launched:
        found.append({"kernel": kernel.name, "source": kernel.source_hash, "form": dict(sorted(form))})
    found.sort(key=str)


def has_run(kernel: GluonKernel, form: Mapping) -> bool:
    """Whether this kernel, as it is now, ran right on a device in this form, under this version of Triton."""
    return (kernel.name, kernel.source_hash, TRITON_VERSION, frozen(form)) in _listed()


@functools.cache
def _listed() -> frozenset:
    """The list as what :func:`has_run` looks for."""
    return frozenset(
        (entry["kernel"], entry["source"], tuple(map(int, entry["triton"].split(".")[:2])), frozen(entry["form"]))
        for entry in json.loads(RAN.read_text())
    )


def frozen(form: Mapping) -> frozenset:
    return frozenset(form.items())


def _missing(chip: Chip) -> str:
    """Why no variant can be launched on a chip, or nothing."""
    if chip.name != "sm_90":
        capability = f"compute capability {chip.architecture[:-1]}.{chip.architecture[-1]}"
        return f"it needs compute capability 9.0, {chip.part} is {capability if chip.vendor == 'nvidia' else chip.name}"
    if not HAS_TRITON or TRITON_VERSION not in TRITON_VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in TRITON_VERSIONS)
        return f"it needs Triton {known}, got {'.'.join(map(str, TRITON_VERSION)) if HAS_TRITON else 'none'}"
    return ""
