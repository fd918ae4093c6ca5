"""compat.torch_npu's signatures against the package's own schemas: names, order, kinds and defaults."""

import inspect

import torch

from mla_kernels.compat import torch_npu
from tests.compat.torch_npu_schemas import NAMES, read

VERSION, SCHEMAS = read()
OVERLOAD = "npu_grouped_matmul.List"  # group_list as integers and output_dtype as a dtype: the same function here
REQUIRED = inspect.Parameter.empty


def of_schema(line):
    """[(name, keyword only, default)]"""
    return [
        (argument.name, argument.kwarg_only, argument.default_value if argument.has_default_value() else REQUIRED)
        for argument in torch._C.parse_schema(f"npu::{line}").arguments
    ]


def of_function(function):
    return [
        (name, parameter.kind is parameter.KEYWORD_ONLY, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def plain(arguments):
    return [(name, only, list(default) if isinstance(default, tuple) else default) for name, only, default in arguments]


def test_signatures():
    assert VERSION == "torch_npu 2.14.0"
    assert [line.split("(")[0] for line in SCHEMAS] == list(NAMES)
    for line in SCHEMAS:
        name = line.split("(")[0]
        if name != OVERLOAD:
            assert plain(of_function(getattr(torch_npu, name))) == of_schema(line), name
    assert set(torch_npu.__all__) - {"cache_views"} == set(NAMES) - {OVERLOAD}


def test_the_other_overload_is_a_part_of_the_signature():
    line = SCHEMAS[NAMES.index(OVERLOAD)].replace(OVERLOAD, "npu_grouped_matmul")
    ours = plain(of_function(torch_npu.npu_grouped_matmul))
    theirs = of_schema(line)
    assert [one for one in ours if one in theirs] == theirs


def test_every_parameter_is_in_its_docstring():
    for name in torch_npu.__all__:
        function = getattr(torch_npu, name)
        missing = [one for one in inspect.signature(function).parameters if one not in function.__doc__]
        assert not missing, f"{name}: {missing}"
