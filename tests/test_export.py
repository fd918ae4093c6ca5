"""Every public op under torch.export and torch.compile: one program for every number of tokens.

Caches are made inside the traced function, and arguments are checked there.
"""

import inspect

import pytest
import torch
from torch.utils import _pytree as pytree

import mla_kernels
from mla_kernels import launch
from mla_kernels.catalogue import CALLS

TOKENS, OTHERS = 11, (2, 17, 40)  # no other axis has the size that is traced, or torch takes them for one
WITHOUT_TRACING = {"convert_cache", "quantisation_error"}
"""What allocates a cache, or looks at values by design, to prepare weights or caches before a model runs."""


class Step(torch.nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, tensors):
        return self.run(**tensors)


@pytest.fixture(autouse=True)
def _torch_mode():
    torch._dynamo.reset()  # the tests' steps share code, and what was compiled of it counts against a limit
    with launch.on_cpu("torch"):
        yield


def same(got, want):
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    return len(got) == len(want) and all(a.dtype == b.dtype and a.equal(b) for a, b in zip(got, want))


def example(call, tokens):
    torch.manual_seed(tokens)
    return call.example(tokens)


def dims(call, tensors, sizes):
    """A Dim of its own for every size's name."""
    axes = {name: call.sizes.get(name, {}) for name in tensors}
    return {name: {axis: sizes[size] for axis, size in by_axis.items()} for name, by_axis in axes.items()}


def test_the_catalogue_has_every_public_function():
    functions = {
        name for name in mla_kernels.__all__ if inspect.isfunction(getattr(mla_kernels, name))
    } - WITHOUT_TRACING
    named = {word for name in CALLS for word in name.split()}
    assert functions <= named, functions - named


@pytest.mark.slow(when=lambda name, strict: list(CALLS).index(name) % 2 == strict)  # one mode of each op is not
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_export_with_any_number_of_tokens(name, strict):
    call = CALLS[name]
    tensors = example(call, TOKENS)
    sizes = {
        size: torch.export.Dim(size, min=least, max=4096) for size, least in (("tokens", 2), ("pages", 2), ("rows", 8))
    }
    shapes = {"tensors": dims(call, tensors, sizes)}
    with torch.no_grad():
        program = torch.export.export(Step(call.run), (tensors,), dynamic_shapes=shapes, strict=strict)
        for tokens in (TOKENS, *OTHERS):
            tensors = example(call, tokens)
            assert same(program.module()(tensors), call.run(**tensors)), tokens


@pytest.mark.parametrize("name", CALLS)
def test_compile_whole(name):
    call = CALLS[name]
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda tensors: call.run(**tensors), fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for tokens in (TOKENS, *OTHERS):
            tensors = example(call, tokens)
            assert same(compiled(tensors), call.run(**tensors)), tokens
    assert graphs == 1
