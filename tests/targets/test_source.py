"""Cutting a kernel's source out of its file."""

import importlib.util
import sys

import pytest

from mla_kernels.targets.source import HEADER, code_of, python_function, standalone

HELPERS = """
from mla_kernels.language import tl, triton

EXTRA = tl.constexpr(8)


@triton.jit
def deep(x):
    return x * EXTRA


@triton.jit
def scale(x):
    return deep(x) + 1
"""

KERNELS = """
import math

from mla_kernels.language import tl, triton
from mla_kernels.made_for_test_helpers import deep as deepest
from mla_kernels.made_for_test_helpers import scale

WIDTH = tl.constexpr(64)
UNUSED = tl.constexpr(1)


@triton.jit
def local(x, SIZE: tl.constexpr):
    return x + SIZE


@triton.jit
def kernel(x_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + offsets, mask=offsets < min(size, BLOCK))
    tl.store(x_ptr + offsets, scale(local(x, WIDTH)))


@triton.jit
def renamed(x_ptr):
    tl.store(x_ptr, deepest(tl.load(x_ptr)))


@triton.jit
def unknown(x_ptr):
    tl.store(x_ptr, math.pi)


@triton.jit
def typo(x_ptr):
    tl.store(x_ptr, undefined_name)
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    def make(name, text):
        path = tmp_path / f"{name.rpartition('.')[2]}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    from mla_kernels.targets import source

    source._module.cache_clear()
    make("mla_kernels.made_for_test_helpers", HELPERS)
    yield make
    source._module.cache_clear()


def test_helpers_constants_and_imports_come_along(load):
    text = standalone(load("mla_kernels.made_for_test", KERNELS).kernel)
    assert text.startswith(HEADER)
    assert "mla_kernels" not in text and "UNUSED" not in text and "undefined_name" not in text
    order = [text.index(piece) for piece in ("EXTRA = ", "def deep(", "def scale(", "def kernel(")]
    assert order == sorted(order)
    assert text.count("@triton.jit") == 4
    assert "WIDTH = tl.constexpr(64)" in text


def test_the_cut_module_runs_alone(load, tmp_path):
    text = standalone(load("mla_kernels.made_for_test", KERNELS).kernel)
    alone = load("alone", text)
    assert python_function(alone.kernel).__code__.co_varnames[:3] == ("x_ptr", "size", "BLOCK")


def test_an_import_under_another_name(load):
    text = standalone(load("mla_kernels.made_for_test", KERNELS).renamed)
    assert "deepest = deep" in text
    assert text.index("def deep(") < text.index("deepest = deep") < text.index("def renamed(")


@pytest.mark.parametrize("name, missing", [("unknown", "math"), ("typo", "undefined_name")])
def test_unknown_names_are_refused(load, name, missing):
    module = load("mla_kernels.made_for_test", KERNELS)
    with pytest.raises(NameError, match=f"made_for_test: '{missing}' is not a module-level"):
        standalone(getattr(module, name))


def test_one_name_for_two_things_is_refused(load):
    module = load("mla_kernels.made_for_test", KERNELS.replace("def local(", "def deep(").replace("local(x", "deep(x"))
    with pytest.raises(NameError, match=r"'deep' is defined in \S+ and in \S+"):
        standalone(module.kernel)


CODE = '''
@triton.jit
def kernel(x_ptr, size):  # fmt: skip
    """One line,

    and more."""
    if size > 0:
        tl.store(x_ptr, "text")
    tl.store(x_ptr, 1)
'''


@pytest.mark.parametrize(
    "old, new",
    [
        ("  # fmt: skip", ""),
        ('    """One line,\n\n    and more."""\n', ""),
        ("One line", "Another line"),
        ("\n    tl.store", "\n\n    # why\n    tl.store"),
        ("(x_ptr, size)", "(\n    x_ptr,\n    size\n)"),
        ("    ", "  "),
    ],
)
def test_code_is_the_same_whatever_is_said_about_it(old, new):
    assert old in CODE and code_of(CODE.replace(old, new)) == code_of(CODE)


@pytest.mark.parametrize(
    "old, new",
    [("1)", "2)"), ("text", "texts"), ("    tl.store(x_ptr, 1)", "        tl.store(x_ptr, 1)"), ("size", "n")],
)
def test_other_code_is_told_apart(old, new):
    assert old in CODE and code_of(CODE.replace(old, new)) != code_of(CODE)
