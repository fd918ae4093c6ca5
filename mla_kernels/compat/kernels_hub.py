"""This package as a kernel repository of Hugging Face's ``kernels``, and its layers in models of transformers.

:func:`write` makes the repository, for which ``kernels`` need not be installed; ``python -m mla_kernels kernels-repo``
calls it. :func:`mapping` names its layers for ``kernels.use_kernel_mapping`` and ``register_kernel_mapping``, and
:func:`kernelize` puts them into a model.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import mla_kernels

OLDEST, NEXT = (0, 17), (0, 18)
"""The first version of ``kernels`` that :func:`mapping` and :func:`kernelize` take, and the first one after them."""

LAYERS = {
    "MegaBlocksMoeMLP": ("GptOssMLP", "Mxfp4GptOssMLP"),
    "SoftmaxTopKRouter": ("Qwen3_5MoeTopKRouter", "LagunaTopKRouter"),
}
"""Name in transformers' hub mapping -> the classes of transformers that look for it."""

DEVICES = ("cpu", "cuda", "rocm", "npu")
VARIANT = Path("build") / "torch-universal"
"""Where ``kernels`` looks for a build that needs no compiling and serves every device."""

APART = ("reference", "autotune", "device")
"""Packages that a checkout keeps elsewhere than in the folder ``mla_kernels``."""

INIT = '''"""mla_kernels {version} as a kernel repository of Hugging Face's kernels.

Written by python -m mla_kernels kernels-repo. An installed mla_kernels is used, and must be of this version; without
one the copy beside this file is.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("mla_kernels") is None:
    sys.path.append(str(Path(__file__).parent / "package"))

import mla_kernels

if mla_kernels.__version__ != "{version}":
    raise ImportError(
        "this kernel repository was written by mla_kernels {version}, and mla_kernels "
        f"{{mla_kernels.__version__}} is installed: write it anew with python -m mla_kernels kernels-repo"
    )

from mla_kernels.compat.kernels_attention import flash_attn_func, flash_attn_varlen_func  # noqa: E402, F401

from . import layers  # noqa: E402
'''
LAYERS_FILE = '''"""What transformers' names stand for."""

from mla_kernels.compat.kernels_layers import {names}  # noqa: F401
'''


def write(folder: Path | str, *, version: int = 1) -> Path:
    """Write the repository into ``folder``, which is new, empty, or one that this function wrote before.

    ``build/torch-universal`` holds ``metadata.json``, ``__init__.py``, ``layers.py`` and a copy of this package's
    Python files and tables, 4 MB. It is loaded by ``kernels.get_local_kernel(folder)``; nothing is downloaded and
    nothing compiled: kernels are Triton's, compiled on their first call.

    Args:
        folder: of the repository.
        version: of the repository in its metadata; the hub's versions are whole numbers.

    Returns:
        ``folder`` as an absolute path.

    Raises:
        TypeError: ``version`` is no integer. ValueError: it is below 1. FileExistsError: ``folder`` is a file, or holds
        something else.
    """
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"version: got {type(version).__name__}, an integer is accepted")
    if version < 1:
        raise ValueError(f"version: got {version}, an integer of at least 1 is accepted")
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and (is_repository(folder) or not any(folder.iterdir()))):
        raise FileExistsError(
            f"folder: got {folder}, which holds something else; a new or an empty folder is accepted, or one that "
            "python -m mla_kernels kernels-repo wrote"
        )
    variant = folder / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    package = variant / "package" / "mla_kernels"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(mla_kernels.__file__).parent, package, ignore=ignored)
    for name in APART:
        if not (package / name).exists():
            (place,) = importlib.util.find_spec(f"mla_kernels.{name}").submodule_search_locations
            shutil.copytree(place, package / name, ignore=ignored)
    files = sorted(path for path in package.rglob("*") if path.is_file())
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    metadata = {
        "name": "mla-kernels", "id": f"_mla_kernels_universal_{source}", "version": version, "license": "Apache-2.0",
        "python-depends": ["einops"], "backend": {"type": "cpu"},
    }  # fmt: skip
    (variant / "__init__.py").write_text(INIT.format(version=mla_kernels.__version__))
    (variant / "layers.py").write_text(LAYERS_FILE.format(names=", ".join(LAYERS)))
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def is_repository(folder: Path) -> bool:
    """Whether :func:`write` wrote this folder."""
    try:
        return json.loads((folder / VARIANT / "metadata.json").read_text())["name"] == "mla-kernels"
    except (OSError, ValueError, LookupError, TypeError):
        return False


def mapping(folder: Path | str) -> dict:
    """Layer name -> device -> ``kernels.LocalLayerRepository``, as ``kernels.use_kernel_mapping`` takes it.

    Args:
        folder: what :func:`write` wrote.

    Raises:
        ValueError: another folder. ImportError: ``kernels`` is missing, or of a version that is not accepted.
    """
    kernels = _kernels()
    folder = Path(folder).absolute()
    if not is_repository(folder):
        raise ValueError(f"folder: got {folder}, accepted is what python -m mla_kernels kernels-repo wrote")
    repositories = {name: kernels.LocalLayerRepository(folder, layer_name=name) for name in LAYERS}
    return {name: dict.fromkeys(DEVICES, repository) for name, repository in repositories.items()}


def kernelize(model: nn.Module, folder: Path | str, *, mode=None, device: str | None = None) -> nn.Module:
    """Put the repository's layers into a model of transformers, by ``kernels.kernelize``, and return the model.

    Layers whose names the repository does not have stay as they are. transformers gives its classes their names only
    beside a version of ``kernels`` that it takes; here they are named in any case.

    Args:
        model: with layers of the classes in ``LAYERS``, GPT-OSS, Qwen3.5-MoE or Laguna.
        folder: what :func:`write` wrote.
        mode: a ``kernels.Mode``; None: ``INFERENCE`` for a model in eval mode, else ``TRAINING``.
        device: "cpu", "cuda", "rocm" or "npu"; None: the model's.

    Raises:
        TypeError: no layer of the model has a name that the repository has. NotImplementedError: a layer that cannot
        be served, with the reason; no layer has been changed then. ValueError: another device or folder.
        ImportError: see :func:`mapping`.
    """
    from mla_kernels.compat.kernels_layers import why_not_served

    kernels = _kernels()
    known = mapping(folder)
    if device is not None and device not in DEVICES:
        raise ValueError(f"device: got {device!r}, accepted: {', '.join(DEVICES)}")
    served = {of: name for name, classes in LAYERS.items() for of in classes}
    modules = [module for module in model.modules() if type(module).__name__ in served]
    if not modules:
        raise TypeError(
            f"model: got {type(model).__name__} without a layer that the repository has a name for, accepted are "
            f"models with {', '.join(served)}"
        )
    for module in modules:
        if reason := why_not_served(module):
            raise NotImplementedError(f"model: {type(module).__name__} cannot be served: {reason}")
    for cls in {type(module) for module in modules}:
        if not hasattr(cls, "kernel_layer_name"):
            kernels.replace_kernel_forward_from_hub(cls, served[cls.__name__])
    if mode is None:
        mode = kernels.Mode.TRAINING if model.training else kernels.Mode.INFERENCE
    with kernels.use_kernel_mapping(known, inherit_mapping=False):
        for module in modules:
            kernels.kernelize(module, mode=mode, device=device, use_fallback=False)
    return model


def _kernels():
    """The library, of a version that this module was tested with."""
    try:
        found = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "mla_kernels.compat.kernels_hub needs Hugging Face's kernels: pip install 'mla_kernels[kernels]'"
        ) from None
    if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < NEXT:
        raise ImportError(
            f"mla_kernels.compat.kernels_hub takes kernels 0.17, not {found}: pip install 'kernels>=0.17,<0.18'"
        )
    import kernels

    return kernels


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m mla_kernels kernels-repo``"""
    made = argparse.ArgumentParser(
        prog="python -m mla_kernels kernels-repo",
        description="Write this package as a kernel repository of Hugging Face's kernels.",
    )
    made.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new or an empty folder")
    made.add_argument("--version", type=int, default=1, metavar="N", help="of the repository (default 1)")
    options = made.parse_args(arguments)
    try:
        folder = write(options.output, version=options.version)
    except (ValueError, OSError) as error:
        made.error(str(error))
    print(f"wrote {folder}: kernels.get_local_kernel({str(folder)!r}) loads it; layers {', '.join(LAYERS)}")
    return 0
