"""define_op: one declaration makes a torch op with its schema, fake, CPU, CUDA and NPU implementations and autograd.

Ops go through ``torch.library.Library`` rather than ``custom_op``: a call costs about a quarter as much.
"""

import os
from collections.abc import Callable

import torch

from mla_kernels import tiles
from mla_kernels.placement import CPU

LIBRARY = torch.library.Library("mla_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

CHECK_VALUES = os.environ.get("MLA_KERNELS_CHECK_VALUES", "0") == "1"
"""Whether values inside device tensors (slots, lengths, ids) are checked too; CPU tensors always are."""


def define_op(
    name: str,
    schema: str,
    *,
    cpu: Callable,
    device: Callable,
    fake: Callable,
    check_values: Callable | None = None,
    autograd: tuple[Callable, Callable] | None = None,
) -> torch._ops.OpOverload:
    """Register ``torch.ops.mla_kernels.<name>`` and return its overload.

    Args:
        name: the op's name.
        schema: its arguments and results in torch's schema language, ``"(Tensor x, float eps=1e-06) -> Tensor"``. All
            arguments are positional. The functions below are called with all of them.
        cpu: the fast torch implementation for CPU tensors.
        device: the launcher of the Triton kernels, for ``cuda`` and ``npu`` tensors (and CPU tensors under
            :func:`mla_kernels.launch.on_cpu`). NPU goes under PrivateUse1, which works before torch_npu renames it.
        fake: shapes and dtypes of the results, for tracing. Within :func:`mla_kernels.tiles.record` the launcher runs
            in its place, up to its launches.
        check_values: raises on bad values inside the tensors, before anything is written. Runs on CPU tensors always
            and on device tensors when ``MLA_KERNELS_CHECK_VALUES=1``, because there it waits for the device.
        autograd: ``(setup_context, backward)``, where the op has a backward.
    """

    LIBRARY.define(name + schema, tags=_TAGS)
    op = getattr(torch.ops.mla_kernels, name).default
    whole, missing = _defaults(op)

    # Each of these is one Python function, and calls nothing that it need not: they are a good part of a small call.

    def on_cpu(*args):
        if len(args) != whole:
            args += missing[len(args)]
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return on_cpu(*args)
        mode = CPU.mode
        if check_values is not None and (mode != "cuda" or CHECK_VALUES):
            check_values(*args)
        if mode != "torch":
            return device(*args)
        with torch._C._AutoDispatchBelowAutograd():  # nothing is recorded here: each operator inside costs 0.5 us less
            return cpu(*args)

    def on_device(*args):
        if len(args) != whole:
            args += missing[len(args)]
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind := args[0].device.type):
            with torch.autocast(kind, enabled=False):
                return on_device(*args)
        if CHECK_VALUES and check_values is not None:
            check_values(*args)
        return device(*args)

    def on_fake(*args):
        if len(args) != whole:
            args += missing[len(args)]
        return (device if tiles.recording() else fake)(*args)

    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_device, "CUDA")
    LIBRARY.impl(name, on_device, "PrivateUse1")
    torch.library.register_fake(f"mla_kernels::{name}", on_fake, lib=LIBRARY)
    if autograd is not None:
        kernel = _autograd_kernel(op, on_cpu, on_device, whole, missing, *autograd)
        LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return op


def _defaults(op) -> tuple[int, dict[int, tuple]]:
    """How many arguments the op has, and the last of them by how many come before: torch leaves out those at the end
    that equal the schema's defaults."""
    arguments = op._schema.arguments
    if any(argument.kwarg_only for argument in arguments):
        raise TypeError(f"{op}: got keyword-only arguments in the schema, positional ones are accepted")
    defaults = tuple(argument.default_value for argument in arguments if argument.has_default_value())
    missing = {len(arguments) - count: defaults[len(defaults) - count :] for count in range(1, len(defaults) + 1)}
    return len(arguments), missing


def _tensor_places(op) -> tuple[int, ...]:
    """Which arguments are tensors, or may be."""
    kinds = [str(argument.type) for argument in op._schema.arguments]
    if any("List[Tensor" in kind or "List[Optional[Tensor" in kind for kind in kinds):
        raise TypeError(f"{op}: got a list of tensors in the schema of an op with a backward, tensors are accepted")
    return tuple(place for place, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]"))


def _autograd_kernel(op, on_cpu, on_device, whole, missing, setup_context, backward):
    """The op's Autograd kernel: torch's own where a gradient is wanted, else straight to the implementation.

    ``torch.library.register_autograd`` always dispatches a second time, which costs more than the rest of the call.
    """
    from torch._library.autograd import Info, make_autograd_impl

    differentiable = make_autograd_impl(op, Info(backward, setup_context))
    keys = torch._C.DispatchKey
    implementations = {keys.CPU: on_cpu, keys.CUDA: on_device, keys.PrivateUse1: on_device}
    known: dict = {}  # key set as an integer -> implementation; looking keys up one by one costs 2 us
    tensors = _tensor_places(op)

    def kernel(keyset, *args):
        if len(args) != whole:  # autograd counts gradients by the arguments that it sees
            args += missing[len(args)]
        if torch.is_grad_enabled():
            for place in tensors:
                if args[place] is not None and args[place].requires_grad:
                    return differentiable(keyset, *args)
        bits = keyset.raw_repr()
        if bits not in known:
            below = keyset & torch._C._after_autograd_keyset
            known[bits] = implementations.get(below.highestPriorityTypeId())
        implementation = known[bits]
        if implementation is not None:
            return implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():  # tracing, fake tensors
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel
