"""expert_ffn: each expert's feed-forward network on its rows, as two grouped matrix products.

Symbols: T tokens, K slots of a token, P = T * K rows in expert order, E experts, H hidden size, I intermediate size.
"""

import torch

from mla_kernels.checks import check_int, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import moe as cpu
from mla_kernels.invariance import wanted
from mla_kernels.moe.dispatch.dispatch import MAX_PAIRS, Dispatch
from mla_kernels.moe.experts.activation import OP_OPTIONS, SWIGLU, Activation, activation_of
from mla_kernels.moe.experts.down import launch_down
from mla_kernels.moe.experts.gate_up import launch_gate_up
from mla_kernels.moe.experts.grouped import Rows
from mla_kernels.shim import define_op


def _launch(hidden, gate_up, down, tokens, offsets, gate_up_bias, down_bias, *activation):
    """Two launches, workspace P * I elements."""
    *activation, batch_invariant = activation
    rows, options = Rows(tokens, offsets, 1), {"batch_invariant": batch_invariant}
    inner = launch_gate_up(hidden, gate_up, rows, bias=gate_up_bias, activation=activation_of(*activation), **options)
    return launch_down(inner, down, rows, bias=down_bias, **options)


def _fake(hidden, gate_up, down, tokens, offsets, *_):
    return hidden.new_empty(tokens.shape[0], hidden.shape[1])


def _check_values(hidden, gate_up, down, tokens, offsets, *_):
    check_range("tokens", tokens, 0, hidden.shape[0], "tokens of hidden")
    check_range("offsets", offsets, 0, tokens.shape[0] + 1, "rows")


_op = define_op(
    "expert_ffn",
    "(Tensor hidden, Tensor gate_up, Tensor down, Tensor tokens, Tensor offsets, Tensor? gate_up_bias=None, "
    f"Tensor? down_bias=None, {OP_OPTIONS}, bool batch_invariant=False) -> Tensor",
    cpu=cpu.expert_ffn,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def check_weight(name: str, weight, shape: tuple, hidden: torch.Tensor) -> None:
    """Refuse ``weight`` unless it has this shape and one of its last two axes is dense."""
    if isinstance(weight, torch.Tensor) and weight.dim() == 3 and weight.stride(1) == 1 and weight.stride(2) != 1:
        check_tensor(name, weight.transpose(1, 2), shape=(shape[0], shape[2], shape[1]), like=hidden)
    else:
        check_tensor(name, weight, shape=shape, like=hidden)
    (_, out, width), (_, of_out, of_width) = weight.shape, weight.stride()
    reach = (out - 1) * of_out + (width - 1) * of_width
    if reach >= 1 << 31:
        raise ValueError(
            f"{name}: got an expert whose last element is {reach} from its first, less than 2^31 is accepted"
        )


def check_weights(hidden, gate_up, down, gate_up_bias=None, down_bias=None) -> None:
    """Refuse hidden [T, H], gate_up [E, 2I, H], down [E, H, I] and biases [E, 2I], [E, H] that do not go together."""
    check_tensor("hidden", hidden, rank=2)
    width = hidden.shape[1]
    if width < 16:
        check_int("hidden size (hidden.shape[1])", width, 16)
    check_weight("gate_up", gate_up, (None, None, width), hidden)
    experts, doubled, _ = gate_up.shape
    if not 1 <= experts <= 1024:
        check_int("number of experts (gate_up.shape[0])", experts, 1, 1024)
    if doubled % 2 or doubled == 0:
        raise ValueError(f"gate_up: got {doubled} rows an expert, an even number is accepted (one of gate, one of up)")
    check_weight("down", down, (experts, width, doubled // 2), hidden)
    if gate_up_bias is not None:
        check_tensor("gate_up_bias", gate_up_bias, shape=(experts, doubled), like=hidden)
    if down_bias is not None:
        check_tensor("down_bias", down_bias, shape=(experts, width), like=hidden)


def check_activation(activation) -> None:
    """Refuse what is no :class:`Activation`."""
    if not isinstance(activation, Activation):
        raise TypeError(f"activation: got {type(activation).__name__}, an Activation is accepted")


def expert_ffn(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    dispatched: Dispatch,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: Activation = SWIGLU,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Each expert's feed-forward network on its rows: down(act(gate_up(x))). Two kernel launches.

    With the default activation these are SwiGLU experts as in DeepSeekMoE (arXiv 2401.06066) and Hugging Face's
    ``DeepseekV3Experts``: down(silu(gate(x)) * up(x)).

    Args:
        hidden: [T, H] bf16, fp16 or fp32, contiguous rows, H at least 16.
        gate_up: [E, 2I, H] in hidden's dtype: each expert's gate rows, then its up rows, or one after the other in turn
            (``activation.interleaved``). Weights stored as [E, H, 2I] are passed as ``stored.transpose(1, 2)``; nothing
            is copied.
        down: [E, H, I] in hidden's dtype; weights stored as [E, I, H] likewise.
        dispatched: from :func:`mla_kernels.dispatch` with E experts.
        gate_up_bias: [E, 2I] in hidden's dtype and gate_up's order of rows.
        down_bias: [E, H] in hidden's dtype.
        activation: see :class:`mla_kernels.Activation`.
        batch_invariant: whether a row's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        rows [T * K, H] in expert order and hidden's dtype: rows[row] belongs to token dispatched.tokens[row]. Rows from
        dispatched.offsets[E] on belong to no expert and are 0.

    Raises:
        ValueError: a wrong rank, shape or device. TypeError: a wrong dtype. NotImplementedError: an input that requires
        grad (:func:`mla_kernels.fused_moe` has a backward).
    """
    check_weights(hidden, gate_up, down, gate_up_bias, down_bias)
    check_activation(activation)
    experts = gate_up.shape[0]
    check_tensor("dispatched.tokens", dispatched.tokens, rank=1, dtypes=(torch.int32,), device=hidden.device)
    check_int("number of rows (dispatched.tokens.numel())", dispatched.tokens.shape[0], 0, MAX_PAIRS - 1)
    offsets = dispatched.offsets
    check_tensor("dispatched.offsets", offsets, shape=(experts + 1,), dtypes=(torch.int32,), device=hidden.device)
    tensors = {"hidden": hidden, "gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    check_no_grad("expert_ffn", **tensors)
    tensors = hidden, gate_up, down, dispatched.tokens, offsets, gate_up_bias, down_bias
    return _op(*tensors, *activation.arguments, wanted(batch_invariant))
