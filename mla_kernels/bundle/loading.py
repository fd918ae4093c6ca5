"""Take up a bundle: check it, and put it in front of Triton's cache."""

import functools
import importlib
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mla_kernels import launch
from mla_kernels.bundle import cache, manifest
from mla_kernels.bundle.manifest import BundleRefused
from mla_kernels.language import HAS_TRITON, INTERPRET, triton

LOG = logging.getLogger("mla_kernels.bundle")
VARIABLE = "MLA_KERNELS_BUNDLE"
MANAGER = "TRITON_CACHE_MANAGER"
FAMILIES = {"nvidia": "CUDA", "amd": "ROCm", "ascend": "CANN"}


@dataclass(eq=False)
class Bundle:
    """A loaded bundle.

    ``found`` counts kernels that were taken from it, ``missed`` those of its kernels that were compiled all the same,
    because no code for their arguments is in it; both by name.
    """

    path: Path
    manifest: dict = field(repr=False)
    entries: dict[str, dict[str, str]] = field(repr=False)
    kernel_of: dict[str, str] = field(repr=False)
    found: Counter = field(default_factory=Counter)
    missed: Counter = field(default_factory=Counter)

    def unload(self) -> None:
        """Kernels that were not launched yet come from Triton again."""
        if self in cache.LOADED:
            cache.LOADED.remove(self)
        if not cache.LOADED:
            _install(cache.BEFORE[0])

    def take(self, key: str) -> dict[str, str]:
        """Files of an entry, counted."""
        self.found[self.kernel_of[key]] += 1
        return self.entries[key]

    def note_missing(self, filename: str) -> None:
        """Count a kernel that is about to be compiled, and say so the first time."""
        name = filename.removesuffix(".json")
        if name not in self.kernel_names:
            return
        self.missed[name] += 1
        if self.missed[name] == 1:
            LOG.warning("%s: bundle %s has no code for these arguments, it is compiled here", name, self.path)

    @functools.cached_property
    def kernel_names(self) -> frozenset[str]:
        return frozenset(self.kernel_of.values())

    def fits_device(self) -> bool:
        """Whether the current device is the bundle's; one that is not ends its use, with a warning."""
        reasons = _device_reasons(self.manifest, triton.runtime.driver.active.get_current_target())
        if reasons:
            LOG.warning("%s", BundleRefused(self.path, reasons))
            self.unload()
        return not reasons


def load(path: str | os.PathLike) -> Bundle:
    """Use the kernels of a bundle from now on, in this process.

    Kernels that were launched before stay as they are. Several bundles may be loaded, of several models. The device is
    not touched: a bundle for another chip is refused here where CUDA is up, else at the first launch, with a warning.

    Args:
        path: the folder that ``python -m mla_kernels build`` wrote.

    Returns:
        The :class:`Bundle`, which counts what is taken from it and what is not.

    Raises:
        TypeError: ``path`` is no path.
        BundleRefused: a ValueError that says what differs: the version of this package, the driver's family, Triton or
            the variables that it looks at, a kernel's source, a file that is missing or damaged. Launches then compile,
            as without a bundle.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: got {type(path).__name__}, the path of a bundle's folder is accepted")
    folder = Path(path).resolve()
    found = manifest.read(folder)
    if not HAS_TRITON:
        raise BundleRefused(folder, ["the package triton is not installed"])
    if INTERPRET:
        raise BundleRefused(folder, ["TRITON_INTERPRET is set, and nothing is compiled"])
    if reasons := _version_reasons(found):
        raise BundleRefused(folder, reasons)
    manifest.check_finished(folder, found)
    if torch.cuda.is_initialized():
        reasons = _device_reasons(found, triton.runtime.driver.active.get_current_target())
    reasons = reasons or _source_reasons(found)
    entries, kernel_of = {}, {}
    for entry in () if reasons else found["kernels"]:
        key = entry["key"]
        files = {name: str(folder / manifest.FOLDER / key / name) for name in entry["files"]}
        for name, said in entry["files"].items():
            reasons += _file_reasons(folder / manifest.FOLDER / key / name, said)
        entries[key], kernel_of[key] = files, entry["kernel"]
    if reasons:
        raise BundleRefused(folder, reasons)
    bundle = Bundle(folder, found, entries, kernel_of)
    if not cache.LOADED:
        cache.BEFORE[0] = _install(cache.BundledFirst)
    cache.LOADED.insert(0, bundle)
    return bundle


def load_named() -> list[Bundle]:
    """Load the bundles that the variable MLA_KERNELS_BUNDLE names, with :data:`os.pathsep` between them; a refused one
    is a warning. Importing the package does it."""
    bundles = []
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        try:
            bundles.append(load(path))
        except BundleRefused as refused:
            LOG.warning("%s: %s", VARIABLE, refused)
    return bundles


def family() -> str:
    """Whose driver kernels are launched through here: "nvidia", "amd" or "ascend"."""
    if (Path(triton.__file__).parent / "backends" / "ascend").is_dir():
        return "ascend"
    return "amd" if torch.version.hip else "nvidia"


def _install(manager):
    """Make Triton ask ``manager``; the one before."""
    if hasattr(triton, "knobs"):
        before, triton.knobs.cache.manager_class = triton.knobs.cache.manager_class, manager
        return before
    module, _, name = os.environ.get(MANAGER, "").partition(":")  # which triton-ascend reads
    before = getattr(importlib.import_module(module), name) if name else None
    if manager is None:  # it goes back to its own by name alone
        manager = triton.runtime.cache.FileCacheManager
    os.environ[MANAGER] = f"{manager.__module__}:{manager.__name__}"
    return before


def _version_reasons(found: dict) -> list[str]:
    """What of this process differs from the one that built."""
    reasons = []
    target, toolchain = found["target"], found["toolchain"]
    if target["vendor"] != family():
        ours, theirs = FAMILIES[family()], FAMILIES.get(target["vendor"], target["vendor"])
        return [f"it is for {theirs} ({target['part']}), kernels are launched through {ours} here"]
    here = {"mla_kernels": manifest.package_version(), "triton": manifest.triton_version()}
    built = {"mla_kernels": found["mla_kernels"], "triton": toolchain["triton"]}
    for name, installed in here.items():
        if built[name] != installed:
            reasons.append(f"it was built with {name} {built[name]}, {installed or 'none'} is installed")
    settings, theirs = manifest.compiler_settings(), toolchain["settings"]
    for name in sorted(settings.keys() | theirs.keys()):
        if settings.get(name) != theirs.get(name):
            said = "not set" if name not in theirs else repr(theirs[name])
            now = "not set" if name not in settings else repr(settings[name])
            reasons.append(f"{name} was {said} when it was built and is {now} here")
    return reasons


def _source_reasons(found: dict) -> list[str]:
    changed = []
    for name, source in found["sources"].items():
        kernel = launch.KERNELS.get(name)
        if kernel is None:
            changed.append(f"{name} (no such kernel)")
        elif source["triton"] != manifest.triton_source(kernel):
            changed.append(f"{name} ({source['hash']} there, {kernel.source_hash} here)")
    return [f"the source differs of {', '.join(changed)}"] if changed else []


def _file_reasons(path: Path, said: dict) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        return [f"{path.parent.name}/{path.name} cannot be read ({error.strerror})"]
    if manifest.digest(data) != said["sha256"]:
        return [f"{path.parent.name}/{path.name} is damaged: its hash is not the manifest's"]
    return []


def _device_reasons(found: dict, target) -> list[str]:
    """Why a bundle is not for the current device, whose name by Triton is ``target``."""
    wanted = found["target"]
    if wanted["vendor"] == "ascend" and (reasons := manifest.ascend_reasons(found, target)):
        return reasons
    if (target.backend, str(target.arch)) == (wanted["backend"], wanted["architecture"]):
        built = found["toolchain"]["digest"]
        if built != manifest.compiler_digest():
            return [f"it was built with another build of triton {found['toolchain']['triton']}"]
        return []
    return [f"it is for {wanted['part']} ({wanted['architecture']}), this device is {target.backend} {target.arch}"]
