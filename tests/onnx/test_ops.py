"""Every inference op in ONNX: by decomposition and as functions, at other numbers of tokens than were exported.

Several ops share a model, since an export takes a second before its first op.
"""

import inspect
import re

import onnx_ir as ir
import pytest
import torch
from torch.utils import _pytree as pytree

import mla_kernels
import mla_kernels.onnx
from mla_kernels import launch
from mla_kernels.catalogue import CALLS
from mla_kernels.onnx import translate
from mla_kernels.onnx.forms import FORMS
from tests.onnx.problems import OTHERS, TOKENS, Ops, examples, run, session, shapes
from tests.support import EPSILON

EXPORTED = [name for name in CALLS if name not in mla_kernels.onnx.WITHOUT_FORM]
_OP = re.compile(r" (?:of|with|without|that|weighted|by)\b")
FIRST = {_OP.split(name)[0]: name for name in reversed(EXPORTED)} | {"hyper_post_pre": "hyper_post_pre without comb"}
"""A call of each op."""

MODELS = [list(FIRST.values())[start : start + 16] for start in range(0, len(FIRST), 16)]
FUNCTIONS = ["mla_decode", "fused_moe", "route", "write_latent", "mla_prolog", "dispatch"]
APART = {"write_latent": 2}
"""Bytes that differ by so much: roundings of scales, and codes of values between two, behind norms of other sums."""


@pytest.fixture(autouse=True)
def _torch_mode():
    with launch.on_cpu("torch"):
        yield


def check(names, **options):
    given = examples(names, TOKENS)
    with torch.no_grad():
        program = torch.export.export(Ops(names).eval(), (given,), dynamic_shapes=shapes(names, given))
    model = mla_kernels.onnx.export(program, **options)
    opsets = model.model.opset_imports
    assert set(opsets) <= {"", "mla_kernels"} and opsets[""] == mla_kernels.onnx.OPSET
    runtime = session(model)
    for tokens in (TOKENS, *OTHERS):
        given = examples(names, tokens)
        got = iter(run(runtime, [tensor for name in names for tensor in given[name].values()]))
        for name in names:
            for want in pytree.tree_leaves(CALLS[name].run(**given[name])):
                same(name, next(got), want)
        assert not list(got)
    return model


def same(name, got, want):
    """fp32 within 1e-5 of the scale, 16 bits within one rounding of it; whole numbers equal."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    if not want.dtype.is_floating_point:
        apart = (got.long() - want.long()).abs()
        apart = torch.minimum(apart, 256 - apart) if want.dtype == torch.uint8 else apart  # bytes of -1 and of 0
        assert not (apart > APART.get(name, 0)).any(), name
        return
    accepted = 1e-5 if want.dtype == torch.float32 else 2 * EPSILON.get(want.dtype, 0.0)
    got, want = got.double(), want.double()
    assert got.isnan().equal(want.isnan()) and got.isinf().equal(want.isinf()), name
    finite = want.isfinite()
    if finite.any():
        scale = want[finite].abs().max()
        assert (got - want)[finite].abs().max() <= accepted * scale, name


def test_every_public_function_has_a_form_or_a_reason():
    functions = {name for name in mla_kernels.__all__ if inspect.isfunction(getattr(mla_kernels, name))}
    named = {word for name in EXPORTED for word in name.split()}
    without = mla_kernels.onnx.WITHOUT_FORM.keys()
    assert without <= functions and functions - without <= named
    composed = {"prefill_rows"}  # of torch's operators
    assert functions - without - composed <= FORMS.keys()


@pytest.mark.parametrize("names", MODELS, ids=lambda names: names[0])
def test_by_decomposition(names):
    model = check(names, optimize=False)
    assert not model.model.functions


@pytest.mark.slow
def test_as_functions():
    model = check(FUNCTIONS, functions=True)
    names = {function.name for function in model.model.functions.values()}
    assert {re.sub(r"_\d+$", "", name) for name in names} == {*FUNCTIONS}
    assert {node.op_type for node in model.model.graph if node.domain == "mla_kernels"} == names


def test_a_function_takes_any_number_of_windows():
    check(["compress_windows"], functions=True)


def test_a_function_that_fixes_a_size_is_refused():
    rows = ir.Value(name="rows", shape=ir.Shape(["n", 8]), type=ir.TensorType(ir.DataType.FLOAT))

    def first_300(rows):
        return rows[:300] if rows.shape[0] > 300 else rows

    with pytest.raises(RuntimeError, match="first_300: its form fixed a dynamic size"):
        translate._function(first_300, {"rows": rows}, mla_kernels.onnx.OPSET)


@pytest.mark.slow
@pytest.mark.parametrize("functions", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_each_alone(name, functions):
    check([name], functions=functions)
