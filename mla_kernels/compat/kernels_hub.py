"""Layers of this package's kernel repository, for Hugging Face's ``kernels``, in models of transformers.

:func:`mla_kernels.kernels_repo.write`, which ``python -m mla_kernels kernels-repo`` calls, makes the repository.
:func:`mapping` names its layers for ``kernels.use_kernel_mapping`` and ``register_kernel_mapping``, and
:func:`kernelize` puts them into a model.
"""

import importlib.metadata
import json
import os
from pathlib import Path

from torch import nn

from mla_kernels.versions import minor

OLDEST, NEXT = (0, 17), (0, 18)
"""The first version of ``kernels`` that :func:`mapping` and :func:`kernelize` take, and the first one after them."""

LAYERS = {
    "MegaBlocksMoeMLP": ("GptOssMLP", "Mxfp4GptOssMLP"),
    "SoftmaxTopKRouter": ("Qwen3_5MoeTopKRouter", "LagunaTopKRouter"),
}
"""Name in transformers' hub mapping -> the classes of transformers that look for it."""

NAME = "mla-kernels"
"""Of the repository, in its metadata."""

DEVICES = ("cpu", "cuda", "rocm", "npu")
VARIANT = Path("build") / "torch-universal"
"""Where ``kernels`` looks for a build that needs no compiling and serves every device."""


def is_repository(folder: Path) -> bool:
    """Whether :func:`mla_kernels.kernels_repo.write` wrote this folder."""
    try:
        return json.loads((folder / VARIANT / "metadata.json").read_text())["name"] == NAME
    except (OSError, ValueError, LookupError, TypeError):
        return False


def path_of(name: str, value) -> Path:
    """An argument as an absolute path; TypeError where it is none."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: got {type(value).__name__}, a path is accepted")
    return Path(value).absolute()


def mapping(folder: Path | str) -> dict:
    """Layer name -> device -> ``kernels.LocalLayerRepository``, as ``kernels.use_kernel_mapping`` takes it.

    Args:
        folder: what ``python -m mla_kernels kernels-repo`` wrote.

    Raises:
        TypeError: ``folder`` is no path. ValueError: another folder. ImportError: ``kernels`` is missing, or of a
        version that is not accepted.
    """
    kernels = _kernels()
    folder = path_of("folder", folder)
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
        folder: what ``python -m mla_kernels kernels-repo`` wrote.
        mode: a ``kernels.Mode``; None: ``INFERENCE`` for a model in eval mode, else ``TRAINING``.
        device: "cpu", "cuda", "rocm" or "npu"; None: the model's.

    Raises:
        TypeError: no layer of the model has a name that the repository has, or it is no model; ``mode`` is no
        ``kernels.Mode``; ``folder`` is no path. NotImplementedError: a layer that cannot be served, with the reason; no
        layer has been changed then. ValueError: another device or folder. ImportError: see :func:`mapping`.
    """
    from mla_kernels.compat.kernels_layers import why_not_served

    kernels = _kernels()
    known = mapping(folder)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, a torch.nn.Module is accepted")
    if not isinstance(mode, kernels.Mode | None):
        raise TypeError(f"mode: got {type(mode).__name__}, a kernels.Mode is accepted, as kernels.Mode.INFERENCE")
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
    if not OLDEST <= minor(found) < NEXT:
        raise ImportError(
            f"mla_kernels.compat.kernels_hub takes kernels 0.17, not {found}: pip install 'kernels>=0.17,<0.18'"
        )
    import kernels

    return kernels
