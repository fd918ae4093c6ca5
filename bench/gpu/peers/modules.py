"""Modules of other packages from single files, with stand-ins for what they import and do not need here."""

import importlib.util
import sys
import types
from pathlib import Path


def stand_in(name: str, **attributes) -> types.ModuleType:
    """The module ``name``, made empty with its parents where there is none, and given these attributes."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        if part not in sys.modules:
            made = sys.modules[part] = types.ModuleType(part)
            made.__path__ = []
            if count > 1:
                setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], made)
    for attribute, value in attributes.items():
        setattr(sys.modules[name], attribute, value)
    return sys.modules[name]


def from_file(root: Path, file: str) -> types.ModuleType:
    """The module that ``file``, a path in a wheel, is there; its package is not imported."""
    name = file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, root / file)
    made = importlib.util.module_from_spec(spec)
    stand_in(name.rpartition(".")[0])
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made
