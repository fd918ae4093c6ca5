"""What export makes of writes and names, and what it refuses."""

import sys

import numpy as np
import onnx
import pytest
import torch
from torch.export import default_decompositions

import mla_kernels as mk
import mla_kernels.onnx
from mla_kernels import launch
from tests.onnx.problems import Call, run, session


@pytest.fixture(autouse=True)
def _torch_mode():
    with launch.on_cpu("torch"):
        yield


class Writer(torch.nn.Module):
    """Writes into an argument and a buffer, and returns what it has read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, source, target, data):
        self.calls.add_(1)
        mk.copy_pages(mk.LatentCache(data, 32), source, target)
        return data[target.long()].sum(), data


def pages():
    return torch.tensor([0, 1, -1]), torch.tensor([5, 4, 3]), torch.randn(6, 2, 48)


def test_writes_are_results():
    given = pages()
    model = mk.onnx.export(Writer(), given, dynamic_shapes=({0: "n"}, {0: "n"}, {0: "pages"}))
    names = [value.name for value in model.model.graph.outputs]
    assert names[2:] == ["calls_out", "data_out"]
    _, target, data = given
    written = data.clone()
    written[5], written[4] = data[0], data[1]
    total, returned, calls, out = run(session(model), given)
    assert returned.equal(written) and out.equal(written) and calls.item() == 1
    assert torch.allclose(total, written[target].sum())
    assert not given[2].equal(written)  # the caller's tensor is as it was


class Taken(torch.nn.Module):
    """Writes into ``data``, and has another value of the name that the result would get."""

    def forward(self, data, data_out):
        data.add_(data_out)
        return data_out * 2


@pytest.mark.parametrize("functions", [False, True])
def test_a_name_that_is_taken_is_refused(functions):
    """onnxruntime refuses a model with a name twice."""
    with pytest.raises(ValueError, match="data_out: what the model writes into data is an output of this name"):
        mk.onnx.export(Taken(), (torch.zeros(3), torch.ones(3)), functions=functions)


class Alike(torch.nn.Module):
    """A buffer and an argument of one name, both written."""

    def __init__(self):
        super().__init__()
        self.register_buffer("data", torch.zeros(3))

    def forward(self, data):
        data.add_(1)
        self.data.add_(2)
        return data * 2


def test_what_is_written_has_names_of_its_own():
    with pytest.raises(ValueError, match="data_out: what the model writes into data"):
        mk.onnx.export(Alike(), (torch.zeros(3),))


def test_a_program_exports_again_and_stays_runnable():
    given = pages()
    program = torch.export.export(Writer(), given)
    for _ in range(2):
        assert len(mk.onnx.export(program, optimize=False).model.graph.outputs) == 4
    (total, returned), (calls, out) = mk.onnx.functional(program).module()(*given)
    assert out.equal(returned) and calls.item() == 1 and total.dim() == 0
    assert not any("mla_kernels_onnx" in str(node.target) for node in program.graph.nodes)  # the given one is as it was


def test_both_ways_of_one_call():
    """By torch's own functions, as the documentation shows them."""
    ways = mk.onnx.translations()
    logits = torch.randn(5, 8)
    module = Call(lambda logits: mk.route(logits, 2)).eval()
    by_table = torch.onnx.export(module, (logits,), dynamo=True, verbose=False, custom_translation_table=ways.table)
    program = torch.export.export(module, (logits,))
    decomposed = program.run_decompositions(default_decompositions() | ways.decompositions)
    assert not any("mla_kernels" in str(node.target) for node in decomposed.graph.nodes)
    by_decomposition = torch.onnx.export(decomposed, dynamo=True, verbose=False)
    want = mk.route(logits, 2)
    for model in (by_table, by_decomposition):
        weights, ids = run(session(model), (logits,))
        assert ids.equal(want[1]) and torch.allclose(weights, want[0])


def test_functions_are_valid_models(tmp_path):
    model = mk.onnx.export(Call(lambda ids: tuple(mk.dispatch(ids, 4))), (torch.zeros(3, 2, dtype=torch.int32),),
                           functions=True, opset_version=23)  # fmt: skip
    model.save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    saved = onnx.load(tmp_path / "model.onnx")
    assert [(function.domain, function.name) for function in saved.functions] == [("mla_kernels", "dispatch_0")]
    assert {(entry.domain, entry.version) for entry in saved.opset_import} == {("", 23), ("mla_kernels", 1)}
    assert np.array(saved.functions[0].opset_import[0].version) == 23


def test_calls_alike_share_a_function():
    def thrice(logits):
        first, second = mk.route(logits, 2), mk.route(logits + 1.0, 2)
        return first[0] + second[0] + mk.route(logits, 2, renormalize=False)[0]

    logits = torch.randn(5, 8)
    model = mk.onnx.export(Call(thrice).eval(), (logits,), dynamic_shapes=(({0: "tokens"},),), functions=True)
    assert sorted(function.name for function in model.model.functions.values()) == ["route_0", "route_1"]
    assert torch.allclose(run(session(model), (logits,))[0], thrice(logits))


def test_refusals():
    logits, ids = torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int32)

    def refused(kind, message, function, *given, **options):
        with pytest.raises(kind, match=message):
            mk.onnx.export(Call(function).eval(), given, **options)

    route = lambda logits: mk.route(logits, 2)  # noqa: E731
    refused(NotImplementedError, "balance_loss: has no form in ONNX: a loss of training", mk.balance_loss, logits, ids)
    refused(NotImplementedError, "route: got batch_invariant=True",
            lambda logits: mk.route(logits, 2, batch_invariant=True), logits)  # fmt: skip
    together = torch.ops._c10d_functional.all_reduce
    refused(NotImplementedError, "_c10d_functional::all_reduce: has no form in ONNX: .*process group",
            lambda x: together(x, "sum", "0"), logits)  # fmt: skip
    refused(ValueError, "opset_version: got 17, 18 or more is accepted", route, logits, opset_version=17)
    refused(ValueError, "opset_version: got 22, 23 or more is accepted with fused attention", route, logits,
            opset_version=22, fused="attention")  # fmt: skip
    refused(ValueError, "fused: got 'moe'.*attention", route, logits, fused="moe")
    refused(TypeError, "fused: got NoneType, a name or several are accepted: attention", route, logits, fused=None)
    for functions in (False, True):  # torch's converter only logs it, and leaves opset 18
        stayed = r"opset_version: got 99, which .*\(it stayed at 18\); a lower one is accepted"
        refused(ValueError, stayed, route, logits, opset_version=99, functions=functions)
    refused(TypeError, "f: accepted of torch.onnx.export's options are input_names.*; the result's save.path. writes",
            route, logits, f="model.onnx")  # fmt: skip
    refused(TypeError, "dynamo: accepted of", route, logits, dynamo=False)
    refused(TypeError, "optimize: accepted of .* with functions", route, logits, optimize=True, functions=True)
    with pytest.raises(TypeError, match="model: got function"):
        mk.onnx.export(route, (logits,))
    with pytest.raises(TypeError, match="program: got Call"):
        mk.onnx.functional(Call(route))


@pytest.mark.parametrize("name", ["args", "kwargs", "dynamic_shapes"])
def test_a_program_has_its_own_arguments(name):
    logits = torch.randn(4, 8)
    program = torch.export.export(Call(lambda logits: mk.route(logits, 2)).eval(), (logits,))
    given = {"args": (logits,), "kwargs": {"logits": logits}, "dynamic_shapes": ({0: "tokens"},)}[name]
    with pytest.raises(ValueError, match=f"{name}: an ExportedProgram has its own"):
        mk.onnx.export(program, **{name: given})


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"export needs onnxscript: pip install 'mla_kernels\[onnx\]'"):
        mk.onnx.export(Call(lambda logits: mk.route(logits, 2)), (torch.randn(4, 8),))


def test_every_reason_is_of_an_op():
    for name, reason in mk.onnx.WITHOUT_FORM.items():
        assert callable(getattr(mk, name)) and reason
    assert "balance_loss" in [op.__name__ for op in mk.onnx.translations().table.values()]
