"""Ops of the catalogue in ONNX: several in one model, run in onnxruntime."""

import onnxruntime
import torch
from torch.utils import _pytree as pytree

from mla_kernels.catalogue import CALLS

TOKENS, OTHERS = 11, (2, 17)
_KINDS = {torch.bfloat16: (torch.int16, 16), torch.float8_e4m3fn: (torch.uint8, 17)}  # as NumPy holds it, ONNX's number


class Call(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


class Ops(torch.nn.Module):
    """Calls of the catalogue by name: arguments and results are dicts by name."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def forward(self, given):
        return [pytree.tree_leaves(CALLS[name].run(**given[name])) for name in self.names]


def example(name, tokens):
    """The catalogue's example, in fp32 where the op takes it."""
    torch.manual_seed(tokens)
    given = CALLS[name].example(tokens)
    wide = {key: x.float() if x.dtype == torch.bfloat16 else x for key, x in given.items()}
    try:
        CALLS[name].run(**wide)
    except (TypeError, ValueError):
        return given  # an op of bfloat16 alone
    return wide


def shapes(names, given):
    """Sizes that grow with the number of tokens are dynamic."""
    dynamic = torch.export.Dim.DYNAMIC
    return ({
        name: {key: dict.fromkeys(CALLS[name].sizes.get(key, ()), dynamic) for key in given[name]} for name in names
    },)  # fmt: skip


def examples(names, tokens):
    return {name: example(name, tokens) for name in names}


def session(program):
    """onnxruntime's of an exported model, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)


def run(session, tensors):
    """Results, as torch tensors, for arguments in the order of the model's."""
    names = [value.name for value in session.get_inputs()]
    assert len(names) == len(tensors), names
    values = {name: to_onnx(tensor) for name, tensor in zip(names, tensors)}
    return [to_torch(value) for value in session.run_with_ort_values(None, values)]


def to_onnx(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype in _KINDS:
        held, number = _KINDS[tensor.dtype]
        array = tensor.view(held).numpy()
        array = array.view("uint16") if held == torch.int16 else array
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def to_torch(value):
    if "float8" in value.data_type():
        return torch.from_numpy(value.numpy().view("uint8").copy()).view(torch.float8_e4m3fn)
    return torch.from_dlpack(value).clone() if value.shape() else torch.tensor(value.numpy())
