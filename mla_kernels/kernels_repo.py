"""``python -m mla_kernels kernels-repo``: this package as a kernel repository of Hugging Face's ``kernels``.

``kernels`` need not be installed. :mod:`mla_kernels.compat.kernels_hub` puts the repository's layers into models.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import mla_kernels
from mla_kernels.compat.kernels_hub import LAYERS, NAME, VARIANT, is_repository, path_of

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
        TypeError: ``folder`` is no path, ``version`` no integer. ValueError: it is below 1, or ``folder``
        holds the package that runs, or lies in it. FileExistsError: ``folder`` is a file, or holds something else.
    """
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"version: got {type(version).__name__}, an integer is accepted")
    if version < 1:
        raise ValueError(f"version: got {version}, an integer of at least 1 is accepted")
    folder, source = path_of("folder", folder), Path(mla_kernels.__file__).parent
    if source.is_relative_to(folder) or folder.is_relative_to(source):
        raise ValueError(f"folder: got {folder}, the package that runs is {source}; one apart from it is accepted")
    if folder.exists() and not (folder.is_dir() and (is_repository(folder) or not any(folder.iterdir()))):
        raise FileExistsError(
            f"folder: got {folder}, which holds something else; a new or an empty folder is accepted, or one that "
            "python -m mla_kernels kernels-repo wrote"
        )
    variant = folder / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    package = variant / "package" / "mla_kernels"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, package, ignore=ignored)
    for name in APART:
        if not (package / name).exists():
            (place,) = importlib.util.find_spec(f"mla_kernels.{name}").submodule_search_locations
            shutil.copytree(place, package / name, ignore=ignored)
    files = sorted(path for path in package.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    metadata = {
        "name": NAME, "id": f"_mla_kernels_universal_{digest}", "version": version, "license": "Apache-2.0",
        "python-depends": ["einops"], "backend": {"type": "cpu"},
    }  # fmt: skip
    (variant / "__init__.py").write_text(INIT.format(version=mla_kernels.__version__))
    (variant / "layers.py").write_text(LAYERS_FILE.format(names=", ".join(LAYERS)))
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


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
    print(f"wrote {folder}: kernels.get_local_kernel(Path({str(folder)!r})) loads it; layers {', '.join(LAYERS)}")
    return 0
