"""A table for ``torch.onnx.export``: each op becomes one node, which calls a function that the model carries.

The function's body is the op's form, exported by torch's own exporter for the sizes and dtypes of this call. A runtime
that knows no ``mla_kernels`` puts the body in the node's place; one that has the op itself finds it by name.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from mla_kernels.onnx.forms import OF_TORCH

DOMAIN = "mla_kernels"
_PRIMES = (
    257, 263, 269, 271, 277, 281, 283, 293, 307, 311, 313, 317, 331, 337, 347, 349, 353, 359, 367, 373, 379, 383,
)  # fmt: skip
"""Sizes to trace a form with, at least two of the longest windows (128): torch.export makes a constant of a size that
is 0 or 1, as of entries where there is one window."""


def translation(op: torch._ops.OpOverload, form: Callable) -> Callable:
    """What ``custom_translation_table`` calls for a node of ``op``."""
    schema = op._schema
    name = schema.name.split("::")[1]
    made: dict = {}  # what a call is like -> its function, for all layers of a model

    def translate(*args, **kwargs):
        values = _by_name(schema, args, kwargs)
        recorder = _recorder()
        key = recorder.opset.version, tuple((argument, _likeness(part)) for argument, part in values.items())
        if key not in made:
            made[key] = _function(form, values, recorder.opset.version)
            made[key].name = f"{name}_{len(made) - 1}"
        function = made[key]
        recorder.functions[function.identifier()] = function
        inputs = [value for part in values.values() for value in _tensors(part)]
        return _call(recorder, function, inputs)

    translate.__name__ = name
    return translate


def refusal(name: str, reason: str) -> Callable:
    """The translation of an op without a form."""

    def translate(*args, **kwargs):
        raise NotImplementedError(f"{name}: has no form in ONNX: {reason}")

    translate.__name__ = name
    return translate


def _by_name(schema, args, kwargs) -> dict:
    """Arguments by name, those with their defaults left out; dtypes as torch's."""
    values = dict(zip((argument.name for argument in schema.arguments), args)) | kwargs
    for argument in schema.arguments:
        if argument.name == "dtype" and isinstance(values.get("dtype"), int):
            values["dtype"] = _torch_dtype(values["dtype"])
    return values


def _likeness(part):
    """What an argument has in common with those of calls of one function."""
    if isinstance(part, list):
        return tuple(_likeness(value) for value in part)
    return (str(part.dtype), str(part.shape)) if _tensors(part) else part


def _tensors(part) -> list:
    """The tensors of an argument, which may be a list of them."""
    import onnx_ir as ir

    if isinstance(part, ir.Value):
        return [part]
    if isinstance(part, Sequence) and not isinstance(part, str):
        return [value for value in part if isinstance(value, ir.Value)]
    return []


class _Form(torch.nn.Module):
    """A form of its tensors alone, the other arguments fixed."""

    def __init__(self, form, values):
        super().__init__()
        self.form, self.values = form, values

    def forward(self, *tensors):
        left = iter(tensors)
        values = {}
        for name, part in self.values.items():
            if isinstance(part, list):
                values[name] = [next(left) if value is _TENSOR else value for value in part]
            else:
                values[name] = next(left) if part is _TENSOR else part
        return self.form(**values)


_TENSOR = object()


def _function(form, values, opset):
    """An onnx_ir.Function of a form, for arguments like these."""
    import onnx_ir as ir
    from onnxscript import optimizer

    given = [value for part in values.values() for value in _tensors(part)]
    fixed = {
        name: _TENSOR if isinstance(part, ir.Value) else
        [_TENSOR if isinstance(value, ir.Value) else value for value in part] if _tensors(part) else part
        for name, part in values.items()
    }  # fmt: skip
    examples, shapes = _examples(given)
    with torch.no_grad():
        program = torch.export.export(_Form(form, fixed).eval(), examples, dynamic_shapes=(shapes,))
    for name, allowed in program.range_constraints.items():
        if allowed.upper <= _PRIMES[-1]:
            raise RuntimeError(f"{form.__name__}: its form fixed a dynamic size, {name}, to at most {allowed.upper}")
    model = _exported(program, opset)
    optimizer.optimize(model)  # and the bodies of loops are put in their places: a function carries no others
    graph = model.graph
    for value in list(graph.initializers.values()):  # a function has no initializers
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)])
        value.replace_all_uses_with(node.outputs[0])
        node.outputs[0].name = value.name
        graph.insert_before(graph[0], node)
    graph.initializers.clear()
    return ir.Function(DOMAIN, "function", graph=graph, attributes=())


def _examples(values) -> tuple[tuple[torch.Tensor, ...], tuple[dict, ...]]:
    """Tensors of the values' sizes and dtypes, with numbers for names of sizes, and which sizes are dynamic."""
    sizes = _Sizes()
    examples, shapes = [], []
    for value in values:
        shape = [size if isinstance(size, int) else sizes(size.value) for size in value.shape]
        examples.append(torch.empty(shape, dtype=_torch_dtype(value.dtype)))
        named = {axis for axis, size in enumerate(value.shape) if not isinstance(size, int)}
        shapes.append({axis: torch.export.Dim.DYNAMIC for axis in named})
    return tuple(examples), tuple(shapes)


class _Sizes:
    """Numbers for the names of sizes: other ones for others, so that no two axes look alike by chance."""

    def __init__(self):
        self.known: dict[str, int] = {}

    def __call__(self, text: str | None) -> int:
        import sympy

        expression = sympy.sympify(text or f"unnamed{len(self.known)}")
        names = sorted(str(symbol) for symbol in expression.free_symbols)
        for name in names:
            self.known.setdefault(name, _PRIMES[len(self.known)])
        return int(expression.subs({name: self.known[name] for name in names}))


# torch's exporter behind its public function. That builds its table of operators anew for every call, which takes a
# second, and puts every function of the model in its place, since onnxscript's converter of versions does.


def export_with_functions(program: ExportedProgram, table: dict, opset: int, shapes, options: dict) -> ONNXProgram:
    """``torch.onnx.export`` of a program, whose functions stay."""
    from torch.onnx._internal.exporter import _core, _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    for op, translate in table.items():
        registry.register_op(op, translate)
    result = _core.export(program, registry=registry, optimize=False, opset_version=None, **options)
    kept = dict(result.model.functions)
    result.model.functions.clear()
    for graph in (result.model.graph, *(function.graph for function in kept.values())):
        _convert(graph, opset)
    result.model.functions.update(kept)
    if shapes is not None:
        result._rename_dynamic_axes(shapes)
    return result


@cache
def _registry(opset: int):
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    for op, form in OF_TORCH.items():
        registry.register_op(op, translation(op, form))
    return registry


def _exported(program, opset):
    from torch.onnx._internal.exporter import _core

    recorder = _core.current_tracer
    try:
        return _core.exported_program_to_ir(program, registry=_registry(opset))
    finally:
        _core.current_tracer = recorder


def _convert(graph, opset):
    """A graph without functions to this opset, in place."""
    import onnx_ir as ir
    from onnxscript import version_converter

    version_converter.convert_version(ir.Model(graph, ir_version=10), opset, fallback=True)


def _recorder():
    import onnxscript

    return onnxscript.evaluator.default()


def _call(recorder, function, inputs):
    import onnx_ir as ir

    node = ir.Node(function.domain, function.name, inputs, num_outputs=len(function.outputs), version=1)
    recorder.nodes.append(node)
    return node.outputs[0] if len(node.outputs) == 1 else node.outputs


def _torch_dtype(dtype) -> torch.dtype:
    import onnx_ir as ir

    return ir.tensor_adapters.to_torch_dtype(ir.DataType(dtype))
