"""Writes as values: ops that take a cache and return the new one, and programs whose writes are results.

ONNX has no tensor that two nodes share, so what an op writes into is an input and an output.
"""

import copy
import operator
import re

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from mla_kernels.onnx.forms import FORMS

LIBRARY = torch.library.Library("mla_kernels_onnx", "DEF")
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def _written(op: torch._ops.OpOverload) -> list[int]:
    """Places of the arguments that the op writes into."""
    return [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]


def _define_twin(name: str, op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """``torch.ops.mla_kernels_onnx.<name>``: the op's results, then what it wrote, as new tensors."""
    places = _written(op)
    arguments = re.sub(r"\(\w!\)", "", str(op._schema).split("(", 1)[1].rsplit(") ->", 1)[0])
    results = len(op._schema.returns)
    LIBRARY.define(f"{name}({arguments}) -> ({', '.join(['Tensor'] * (results + len(places)))})")

    def run(*args):
        args = list(args)
        for place in places:
            args[place] = args[place].clone()
        result = op(*args)
        before = () if results == 0 else (result,) if results == 1 else tuple(result)
        after = (*before, *(args[place] for place in places))
        return after[0] if len(after) == 1 else after

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mla_kernels_onnx::{name}", run, lib=LIBRARY)
    return getattr(torch.ops.mla_kernels_onnx, name).default


def _twins() -> dict[torch._ops.OpOverload, torch._ops.OpOverload]:
    ops = {name: getattr(torch.ops.mla_kernels, name).default for name in FORMS}
    return {op: _define_twin(name, op) for name, op in ops.items() if _written(op)}


TWINS = _twins()
"""Op that writes in place -> the op that returns what it would write."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """A program without writes: each argument and buffer that it writes into becomes a further result.

    ``torch.onnx.export`` drops such writes without a word. Results come first, then what is written, in the order of
    ``program.run_decompositions({})``'s signature (buffers, then arguments), named as the argument or buffer with
    ``_out`` behind. The library's ops that write, ``write_latent`` and others, become ops that return the new tensor.

    Args:
        program: what ``torch.export.export`` returned.

    Returns:
        A program of the same arguments; the one given stays as it is. Its result is a pair where something is
        written: the old result, and the list of what is written.

    Raises:
        TypeError: it is no ExportedProgram.
    """
    return as_functional(program)[0]


def as_functional(program: ExportedProgram) -> tuple[ExportedProgram, list[str]]:
    """:func:`functional`, and the names of what is written."""
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: got {type(program).__name__}, a torch.export.ExportedProgram is accepted")
    if not _writes(program.graph_module):
        return program, []
    module = copy.deepcopy(program.graph_module)
    for old, new in zip(program.graph.nodes, module.graph.nodes):
        new.name = old.name  # a copy of a node called input is called input_1
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            _write_by_value(part.graph)
            part.recompile()
    new = _with(program, module, _of_results(program.graph_signature, module.graph))
    return _writes_as_results(new.run_decompositions({}))


def _writes(module: torch.fx.GraphModule) -> bool:
    graphs = (part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule))
    targets = (node.target for graph in graphs for node in graph.nodes)
    return any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets)


def _write_by_value(graph: torch.fx.Graph) -> None:
    """Each op that writes becomes its twin, and a copy of what that returns."""
    for node in list(graph.nodes):
        twin = TWINS.get(node.target) if node.op == "call_function" else None
        if twin is None:
            continue
        places, results = _written(node.target), len(node.target._schema.returns)
        names = [argument.name for argument in node.target._schema.arguments]
        targets = [node.args[p] if p < len(node.args) else node.kwargs[names[p]] for p in places]
        with graph.inserting_before(node):
            call = _insert(graph, node, twin, node.args, node.kwargs)
            count = results + len(places)
            parts = [call]
            if count > 1:
                parts = [_insert(graph, node, operator.getitem, (call, i), {}) for i in range(count)]
            for target, value in zip(targets, parts[results:]):
                _insert(graph, node, torch.ops.aten.copy_.default, (target, value), {})
        if results == 1:
            node.replace_all_uses_with(parts[0])
        else:
            for user in list(node.users):
                user.replace_all_uses_with(parts[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)


def _of_results(signature: ExportGraphSignature, graph: torch.fx.Graph) -> ExportGraphSignature:
    """The signature with the names of the nodes that are results now."""
    specs = []
    for spec, value in zip(signature.output_specs, graph.output_node().args[0]):
        if isinstance(value, torch.fx.Node):
            spec = OutputSpec(spec.kind, TensorArgument(name=value.name), spec.target)
        specs.append(spec)
    return ExportGraphSignature(signature.input_specs, specs)


def _insert(graph, node, target, args, kwargs):
    """A new call with the metadata of the node that it stands for."""
    call = graph.call_function(target, args, kwargs)
    args, kwargs = pytree.tree_map_only(torch.fx.Node, lambda part: part.meta["val"], (call.args, call.kwargs))
    call.meta = {**node.meta, "val": target(*args, **kwargs)}
    return call


def _writes_as_results(program: ExportedProgram) -> tuple[ExportedProgram, list[str]]:
    """A functional program whose mutated inputs are results of its own, and their names."""
    signature = program.graph_signature
    output = program.graph.output_node()
    specs, values, names, moved = [], [], [], []
    for spec, value in zip(signature.output_specs, output.args[0]):
        if spec.kind in _MUTATIONS:
            names.append(spec.target.replace(".", "_"))
            moved.append(value)
        else:
            specs.append(spec)
            values.append(value)
    if not moved:
        return program, []
    for value in moved:
        with program.graph.inserting_before(output):  # the model may return it, too: each result is a value of its own
            value = _insert(program.graph, value, torch.ops.aten.clone.default, (value,), {})
        values.append(value)
        specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=value.name), None))
    output.args = (tuple(values),)
    program.graph_module.recompile()
    calls = copy.deepcopy(program.module_call_graph)
    whole = calls[0].signature
    whole.out_spec = pytree.TreeSpec(tuple, None, [program.call_spec.out_spec, pytree.tree_structure([0] * len(moved))])
    whole.outputs = [spec.arg for spec in specs]
    new = ExportGraphSignature(signature.input_specs, specs)
    return _with(program, program.graph_module, new, calls), names


def _with(program, module, signature, calls=None) -> ExportedProgram:
    """The program with another graph, signature and, where given, call graph."""
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=copy.deepcopy(program.module_call_graph) if calls is None else calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
