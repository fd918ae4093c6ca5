"""translations and export: the library's ops for torch.onnx.export, and the whole way in one call."""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from mla_kernels.checks import check_choice
from mla_kernels.onnx.forms import COLLECTIVE, FORMS, GRADIENTS, OF_TORCH, WITHOUT_FORM
from mla_kernels.onnx.functional import TWINS, as_functional
from mla_kernels.onnx.fused import FUSED
from mla_kernels.onnx.translate import export_with_functions, refusal, translation

OPSET = 22
"""What :func:`export` writes unless told otherwise; ``fused="attention"`` needs 23."""

OPTIONS = (
    "input_names", "output_names", "report", "verify", "profile", "dump_exported_program", "artifacts_dir", "verbose",
)  # fmt: skip
"""Of ``torch.onnx.export``, which :func:`export` hands on. A file is not written by it, since outputs get their names
behind it."""
WITHOUT_FUNCTIONS = ("optimize", "custom_translation_table")
_ATTENTION_OPSET = 23
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Translations(NamedTuple):
    """The library's ops for torch's exporters, as :func:`translations` gives them.

    ``table`` is the ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)``: op -> what adds its nodes,
    one that calls a function ``mla_kernels::<op>_<n>`` of the model. ``decompositions``, put after
    ``torch.export.default_decompositions()``, leave operators of torch alone: op -> torch function.
    """

    table: dict[Callable, Callable]
    decompositions: dict[Callable, Callable]


def _reason(name: str) -> str:
    return WITHOUT_FORM.get(name, GRADIENTS)


def translations(fused: Sequence[str] | str = ()) -> Translations:
    """Both ways of this library's ops into ONNX: ``translations().table`` and ``translations().decompositions``.

    ``torch.onnx.export(model, args, dynamo=True, custom_translation_table=translations().table)`` makes each call of an
    op one node, whose function stands in the model; ``program.run_decompositions(default_decompositions() |
    translations().decompositions)`` makes it operators of torch, which torch's own table translates. Both compute the
    same: in float32, from the op's reference or a form of it without loops over tokens, rounded as the op rounds.

    Ops that write into a cache are in neither: see :func:`mla_kernels.onnx.functional`, and
    :func:`mla_kernels.onnx.export`, which does all of it.

    Args:
        fused: which fused operators of a runtime to use, one name or several: "attention" (ai.onnx.Attention, opset
            23: mla_decode and mla_prefill), "experts" (onnxruntime's com.microsoft.MoE and QMoE: fused_moe,
            fused_experts of int8), "router" (com.microsoft.MoEGroupRouter: route with sigmoid).

    Returns:
        Translations, two dicts by op.

    Raises:
        TypeError: ``fused`` is neither a name nor several. ValueError: another name in it. While exporting,
        NotImplementedError for an op without a form, for batch_invariant=True, and for options that a fused operator
        lacks; torch wraps it in its ConversionError.
    """
    forms = dict(FORMS)
    for name in _names(fused):
        check_choice("fused", name, tuple(FUSED))
        forms |= FUSED[name]
    ops: dict[Callable, Callable] = dict(OF_TORCH)
    for name, form in forms.items():
        op = getattr(torch.ops.mla_kernels, name).default
        ops[TWINS.get(op, op)] = form
    table = {op: translation(op, form) for op, form in ops.items()}
    for name in _without_form():
        table[getattr(torch.ops.mla_kernels, name).default] = refusal(name, _reason(name))
    return Translations(table, ops)


def _names(fused) -> tuple[str, ...]:
    if not isinstance(fused, Iterable):
        raise TypeError(f"fused: got {type(fused).__name__}, a name or several are accepted: {', '.join(FUSED)}")
    return (fused,) if isinstance(fused, str) else tuple(fused)


def _without_form() -> list[str]:
    """Ops of the library that no table has: of training, and of preparing."""
    schemas = torch._C._jit_get_all_schemas()
    names = {schema.name.removeprefix("mla_kernels::") for schema in schemas if schema.name.startswith("mla_kernels::")}
    return sorted(names - FORMS.keys())


def export(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    functions: bool = False,
    fused: Sequence[str] | str = (),
    opset_version: int | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """A model that calls this library's ops, in ONNX: ``torch.export``, writes as results, the ops' forms,
    ``torch.onnx.export``.

    A cache that the model writes into is an input of the result and an output, ``<name>_out`` behind the model's own
    results: the caller hands the output back with the next call. A buffer that it writes is an initializer and such an
    output. Without gradients, whatever the mode around.

    ``program = mla_kernels.onnx.export(model, (hidden, cache), dynamic_shapes=({0: "tokens"}, None))`` and
    ``program.save("model.onnx")``.

    Args:
        model: a module, or what ``torch.export.export`` made of one (then without args, kwargs and dynamic_shapes).
        args, kwargs: examples of its arguments.
        dynamic_shapes: as ``torch.onnx.export`` takes them: ``torch.export.Dim`` s, or names of any size (strings).
        functions: whether each call of an op stays one node, ``mla_kernels::<op>_<n>``, with its function in the
            model, which runtimes put in its place; else the model is of ai.onnx operators alone (and those of
            ``fused``).
        fused: as :func:`translations` takes it.
        opset_version: of ai.onnx; None is 22, or 23 with "attention".
        options: of ``torch.onnx.export``: ``input_names``, ``output_names``, ``report``, ``verify``, ``profile``,
            ``dump_exported_program``, ``artifacts_dir``, ``verbose``; without functions also ``optimize`` and
            ``custom_translation_table``.

    Returns:
        torch's ONNXProgram: ``model_proto``, ``save(path)``.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: ``model`` is neither; ``fused`` is no name and not several; another option.
        ValueError: an opset below 18, or below 23 with "attention", or one that the installed onnx and onnxscript do
            not write; an unknown name in ``fused``; a ``<name>_out`` that is taken; args, kwargs or
            dynamic_shapes beside an ExportedProgram.
        NotImplementedError: an op without a form in ONNX (gradients, collectives of process groups), named with the
            reason; batch_invariant=True; what a fused operator does not compute.
        RuntimeError: a form would fix a size that is dynamic.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"mla_kernels.onnx.export needs {' and '.join(missing)}: pip install 'mla_kernels[onnx]'")
    names = _names(fused)
    ways = translations(names)
    opset = _opset(opset_version, names)
    accepted = OPTIONS if functions else OPTIONS + WITHOUT_FUNCTIONS
    for name in options:
        if name not in accepted:
            instead = "; the result's save(path) writes a file" if name in ("f", "external_data") else ""
            said = f"{name}: accepted of torch.onnx.export's options are {', '.join(accepted)}"
            raise TypeError(said + (" with functions" if functions else "") + instead)
    if not isinstance(model, torch.nn.Module | ExportedProgram):
        raise TypeError(
            f"model: got {type(model).__name__}, a torch.nn.Module or torch.export.ExportedProgram is accepted"
        )
    if isinstance(model, ExportedProgram):
        for name, given in (("args", args), ("kwargs", kwargs), ("dynamic_shapes", dynamic_shapes)):
            if given:
                raise ValueError(f"{name}: an ExportedProgram has its own, and is accepted without")
    with torch.no_grad():
        if isinstance(model, torch.nn.Module):
            model = torch.export.export(model, args, kwargs, dynamic_shapes=_sizes(dynamic_shapes), strict=False)
        _refuse(model)
        program, written = as_functional(model)
        options = {"verbose": False, **options}
        with warnings.catch_warnings(), _own_errors():
            warnings.filterwarnings("ignore", "# The axis name")  # two axes of one name are meant
            if functions:
                result = export_with_functions(program, ways.table, opset, dynamic_shapes, options)
            else:
                axes = {"dynamic_shapes": dynamic_shapes}  # for their names alone
                with _known_to_torch(ways.decompositions):
                    result = torch.onnx.export(program, dynamo=True, opset_version=opset, **axes, **options)
        _check_opset(result.model, opset)
        _check_sizes(model, result.exported_program)
        _forget_symbols(model)
    _name_written(result.model.graph, written)
    return result


def _name_written(graph, written: list[str]) -> None:
    """Call the last outputs ``<name>_out``. Names are unique in a model; one that is taken makes it invalid."""
    outputs = graph.outputs[len(graph.outputs) - len(written) :]
    names = {id(output): f"{name}_out" for output, name in zip(outputs, written)}
    values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
    taken = {value.name for value in values if id(value) not in names}
    for output, name in zip(outputs, written):
        new = names[id(output)]
        if new in taken:
            raise ValueError(
                f"{new}: what the model writes into {name} is an output of this name, which is taken: call the "
                "argument, buffer or output that has it otherwise"
            )
        taken.add(new)
        output.name = new


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """What a form refuses, not the ConversionError that torch makes of it."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NotImplementedError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _forget_symbols(program: ExportedProgram) -> None:
    """Take back the names of sizes that torch's exporter made up last and left with the program, whose next export
    would miss them: every second one of the same program failed (torch 2.15)."""
    for node in program.graph.find_nodes(op="placeholder"):
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            mode.shape_env.pending_fresh_unbacked_symbols.clear()
            return


@contextlib.contextmanager
def _known_to_torch(decompositions: dict[Callable, Callable]) -> Iterator[None]:
    """Within the block torch's exporter, which decomposes what it does not know, takes these, too: so the graph of the
    forms is traced once, and not by ``run_decompositions`` and then again."""
    known = torch._decomp.decomposition_table
    before = {op: known[op] for op in decompositions if op in known}
    known.update(decompositions)
    try:
        yield
    finally:
        for op in decompositions:
            del known[op]
        known.update(before)


def _opset(version: int | None, fused: tuple[str, ...]) -> int:
    least = _ATTENTION_OPSET if "attention" in fused else 18
    if version is None:
        return max(least, OPSET)
    if not isinstance(version, int) or isinstance(version, bool) or version < least:
        needed = " with fused attention" if least > 18 else ""
        raise ValueError(f"opset_version: got {version!r}, {least} or more is accepted{needed}")
    return version


def _check_opset(model, opset: int) -> None:
    """Where their converters fail, torch and onnxscript log it and leave the model as it was, at opset 18."""
    found = {graph.opset_imports.get("", opset) for graph in (model.graph, *model.functions.values())} - {opset}
    if found:
        functions = " in a model with functions" if model.functions else ""
        raise ValueError(
            f"opset_version: got {opset}, which the installed onnx and onnxscript do not write{functions} "
            f"(it stayed at {min(found)}); a lower one is accepted, {OPSET} unless told otherwise"
        )


def _sizes(shapes):
    """dynamic_shapes for torch.export: a name is any size."""
    if isinstance(shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(shapes, dict):
        return {key: _sizes(value) for key, value in shapes.items()}
    return type(shapes)(_sizes(value) for value in shapes) if isinstance(shapes, (list, tuple)) else shapes


def _refuse(program: ExportedProgram) -> None:
    """Name the first op that has no form."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            space, name = node.target.name().split("::")
            name = name.split(".")[0]
            if space == "mla_kernels" and name not in FORMS:
                raise NotImplementedError(f"{name}: has no form in ONNX: {_reason(name)}")
            if space in _COLLECTIVES:
                raise NotImplementedError(f"{space}::{name}: has no form in ONNX: {COLLECTIVE}")


def _check_sizes(before: ExportedProgram, after: ExportedProgram) -> None:
    """A traced size that a function asks for by ``len`` becomes a number without a word."""
    new = {node.name: node.meta["val"] for node in after.graph.find_nodes(op="placeholder")}  # and tables of forms
    for old in before.graph.find_nodes(op="placeholder"):
        if not isinstance(old.meta["val"], torch.Tensor):
            continue
        for axis, (was, now) in enumerate(zip(old.meta["val"].shape, new[old.name].shape)):
            if isinstance(was, torch.SymInt) and not isinstance(now, torch.SymInt):
                raise RuntimeError(f"{old.name}: axis {axis} is dynamic, and a form fixed it to {now}")
