"""What the mixture-of-experts ops refuse, and in which words."""

import re

import pytest
import torch

from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import Dispatch, dispatch
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.parts import expert_ffn

pytestmark = pytest.mark.usefixtures("cpu_code")

IDS = torch.zeros(2, 3, dtype=torch.int32)
HIDDEN, GATE_UP, DOWN, WEIGHTS = torch.zeros(2, 32), torch.zeros(8, 48, 32), torch.zeros(8, 32, 24), torch.zeros(2, 3)
ROWS = torch.zeros(6, 32)
META = torch.device("meta")


def sorted_pairs(**changes) -> Dispatch:
    return dispatch(IDS, 8)._replace(**changes)


def refused(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "ids, num_experts, error, text",
    [
        (IDS[0], 8, ValueError, "ids: got 1 dimensions (3,), 2 are accepted"),
        (IDS.long(), 8, TypeError, "ids: got dtype int64, accepted: int32"),
        (IDS.T.contiguous().T, 8, ValueError, "ids: got stride 2 in the last dimension"),
        (IDS[:, :0], 8, ValueError, "top_k (ids.shape[1]): got 0, an integer of at least 1 is accepted"),
        (torch.empty(1 << 22, 4, device=META).int(), 8, ValueError, "number of pairs (ids.numel()): got 16777216"),
        (IDS, 0, ValueError, "num_experts: got 0, an integer from 1 to 1024 is accepted"),
        (IDS, 1025, ValueError, "num_experts: got 1025, an integer from 1 to 1024 is accepted"),
    ],
)  # fmt: skip
def test_dispatch_refuses(ids, num_experts, error, text):
    refused(lambda: dispatch(ids, num_experts), error, text)


LAYER_REFUSALS = [
    ({"hidden": HIDDEN[0]}, ValueError, "hidden: got 1 dimensions (32,), 2 are accepted"),
    ({"hidden": HIDDEN.double()}, TypeError, "hidden: got dtype float64, accepted: bfloat16, float16, float32"),
    ({"hidden": HIDDEN.half()}, TypeError, "gate_up: got dtype float32, accepted: float16"),
    ({"hidden": HIDDEN.to(META)}, ValueError, "gate_up: got a tensor on cpu, all arguments must be on meta"),
    ({"hidden": HIDDEN[:, :8]}, ValueError, "hidden size (hidden.shape[1]): got 8, an integer of at least 16"),
    ({"hidden": torch.zeros(2, 64)[:, ::2]}, ValueError, "hidden: got stride 2 in the last dimension, 1 is accepted"),
    ({"gate_up": GATE_UP[0]}, ValueError, "gate_up: got shape (48, 32), (any, any, 32) is accepted"),
    ({"gate_up": GATE_UP[:, :, :16]}, ValueError, "gate_up: got shape (8, 48, 16), (any, any, 32) is accepted"),
    ({"gate_up": GATE_UP[:, :47]}, ValueError, "gate_up: got 47 rows an expert, an even number is accepted"),
    ({"gate_up": GATE_UP[:0]}, ValueError, "number of experts (gate_up.shape[0]): got 0, an integer from 1 to 1024"),
    ({"down": DOWN[:7]}, ValueError, "down: got shape (7, 32, 24), (8, 32, 24) is accepted"),
    ({"down": DOWN[:, :, :20]}, ValueError, "down: got shape (8, 32, 20), (8, 32, 24) is accepted"),
    ({"down": DOWN.bfloat16()}, TypeError, "down: got dtype bfloat16, accepted: float32"),
    ({"gate_up": torch.zeros(8, 48, 64)[:, :, ::2]}, ValueError, "gate_up: got stride 2 in the last dimension"),
    ({"gate_up_bias": torch.zeros(8, 24)}, ValueError, "gate_up_bias: got shape (8, 24), (8, 48) is accepted"),
    ({"gate_up_bias": torch.zeros(8, 48).half()}, TypeError, "gate_up_bias: got dtype float16, accepted: float32"),
    ({"down_bias": torch.zeros(8, 24)}, ValueError, "down_bias: got shape (8, 24), (8, 32) is accepted"),
    ({"down_bias": torch.zeros(8, 32, device=META)}, ValueError, "down_bias: got a tensor on meta"),
    ({"activation": "gpt_oss"}, TypeError, "activation: got str, an Activation is accepted"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, text", LAYER_REFUSALS)
def test_expert_ffn_and_fused_moe_refuse(changes, error, text):
    layer = {"hidden": HIDDEN, "gate_up": GATE_UP, "down": DOWN} | changes
    refused(lambda: fused_moe(**layer, weights=WEIGHTS, ids=IDS), error, text)
    refused(lambda: expert_ffn(**layer, dispatched=sorted_pairs()), error, text)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"ids": IDS.long()}, TypeError, "ids: got dtype int64, accepted: int32"),
        ({"ids": IDS[:1]}, ValueError, "ids: got shape (1, 3), (2, any) is accepted"),
        ({"ids": IDS.to(META)}, ValueError, "ids: got a tensor on meta, all arguments must be on cpu"),
        ({"weights": WEIGHTS[:, :2]}, ValueError, "weights: got shape (2, 2), (2, 3) is accepted"),
        ({"weights": WEIGHTS.half()}, TypeError, "weights: got dtype float16, accepted: float32"),
        ({"weight_at": "down"}, ValueError, "weight_at: got 'down', accepted: 'input', 'activation', 'output'"),
    ],
)
def test_fused_moe_refuses(changes, error, text):
    arguments = {"hidden": HIDDEN, "gate_up": GATE_UP, "down": DOWN, "weights": WEIGHTS, "ids": IDS} | changes
    refused(lambda: fused_moe(**arguments), error, text)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"tokens": torch.zeros(6)}, TypeError, "dispatched.tokens: got dtype float32, accepted: int32"),
        ({"tokens": IDS}, ValueError, "dispatched.tokens: got 2 dimensions (2, 3), 1 are accepted"),
        ({"offsets": IDS[0]}, ValueError, "dispatched.offsets: got shape (3,), (9) is accepted"),
        ({"tokens": torch.full((6,), 2).int()}, ValueError, "tokens: got values from 2 to 2, accepted: 0 to 1"),
        ({"offsets": torch.full((9,), 7).int()}, ValueError, "offsets: got values from 7 to 7, accepted: 0 to 6"),
    ],
)  # fmt: skip
def test_expert_ffn_refuses(changes, error, text):
    refused(lambda: expert_ffn(HIDDEN, GATE_UP, DOWN, sorted_pairs(**changes)), error, text)


def test_expert_ffn_has_no_backward():
    wanted = GATE_UP.clone().requires_grad_()
    text = "expert_ffn has no backward and gate_up requires grad"
    refused(lambda: expert_ffn(HIDDEN, wanted, DOWN, sorted_pairs()), NotImplementedError, text)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"clamp": "relu"}, "clamp: got 'relu', accepted: 'none', 'pre', 'post', 'gpt_oss'"),
        ({"clamp": "pre"}, "limit: got None with clamp 'pre', a number above 0 is accepted"),
        ({"clamp": "post", "limit": 0.0}, "limit: got 0.0 with clamp 'post', a number above 0 is accepted"),
        ({"limit": 7.0}, "limit: got 7.0 with clamp 'none', None is accepted there"),
    ],
)
def test_activation_refuses(arguments, text):
    refused(lambda: Activation(**arguments), ValueError, text)


@pytest.mark.parametrize(
    "rows, weights, changes, error, text",
    [
        (ROWS[0], WEIGHTS, {}, ValueError, "rows: got 1 dimensions (32,), 2 are accepted"),
        (ROWS[:5], WEIGHTS, {}, ValueError, "rows: got 5 rows, 6 are accepted (one for each of weights' values)"),
        (ROWS, WEIGHTS.half(), {}, TypeError, "weights: got dtype float16, accepted: float32"),
        (ROWS, WEIGHTS.to(META), {}, ValueError, "weights: got a tensor on meta, all arguments must be on cpu"),
        (ROWS, WEIGHTS, {"inverse": IDS}, ValueError, "dispatched.inverse: got shape (2, 3), (6) is accepted"),
        (ROWS, WEIGHTS, {"offsets": torch.zeros(9)}, TypeError, "dispatched.offsets: got dtype float32, accepted:"),
        (ROWS, WEIGHTS, {"inverse": torch.full((6,), 7).int()}, ValueError, "inverse: got values from 7 to 7"),
        (ROWS.clone().requires_grad_(), WEIGHTS, {}, NotImplementedError, "combine has no backward and rows requires"),
    ],
)  # fmt: skip
def test_combine_refuses(rows, weights, changes, error, text):
    refused(lambda: combine(rows, weights, sorted_pairs(**changes)), error, text)
