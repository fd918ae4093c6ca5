"""The order of the house: a module imports from its own room and from lower floors alone, and never in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
LAUNCH = {"gluon_launch", "gpu_launch", "launch", "placement", "shim", "tile_files", "tiles"}
TOOLS = {"", "__main__", "agreement", "catalogue", "check", "demo", "device", "kernels_repo"}
FLOORS = (
    ({"checks"}, {"invariance"}, {"language", "versions"}),
    ({"quant"}, {"targets"}, {"reference"}),
    ({"cpu"}, LAUNCH),
    ({"latent"},),
    ({"hopper"},),
    ({"attention"}, {"moe"}, {"hyper"}),
    ({"nn"},),
    ({"compat"},),
    (TOOLS,),
    ({"autotune"},),
)
"""Rooms from the ground up. A room is a folder of the package, or files at its top that belong together."""

FOLDERS = {
    "mla_kernels": "mla_kernels",
    "autotune": "mla_kernels.autotune",
    "reference": "mla_kernels.reference",
    "bench/gpu": "mla_kernels.device",
}
"""Where the package's folders stand, and the names that they install under."""

IN_A_ROOM = {"op", "forward", "tiles"}
"""Files that every room of attention has."""


def modules() -> dict[str, Path]:
    """Name -> file of every module of the package."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = (*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:
                module = f"{name.rpartition('.')[0]}.{module}"
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in known else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & known.keys()) - {name}


def place(name: str) -> tuple[int, int]:
    """(floor, room on it) of a module."""
    _, top, *_ = *name.split("."), ""
    (found,) = [(f, r) for f, floor in enumerate(FLOORS) for r, room in enumerate(floor) if top in room]
    return found


def test_imports_come_from_the_same_room_or_from_below():
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name in known
        for other in imports(name, known)
        if place(other) != place(name) and place(other)[0] >= place(name)[0]
    ]
    assert not wrong


def test_no_circle():
    known = modules()
    graphlib.TopologicalSorter({name: imports(name, known) for name in known}).prepare()


def test_every_folder_is_a_package_that_installs():
    known = modules()
    text = (ROOT / "pyproject.toml").read_text()
    folders = {"mla_kernels", *(name.rpartition(".")[0] for name in known if "." in name)}
    assert all(f'"{folder}",' in text for folder in folders)


def test_rooms_of_attention_have_the_same_files():
    for room in (ROOT / "mla_kernels/attention").iterdir():
        if (room / "__init__.py").is_file():
            assert {path.stem for path in room.glob("*.py")} >= IN_A_ROOM, room.name
