"""What the routers refuse, and in which words."""

import re

import pytest
import torch

from mla_kernels.moe.route.hash_route import hash_route
from mla_kernels.moe.route.route import route

pytestmark = pytest.mark.usefixtures("cpu_code")

LOGITS = torch.zeros(2, 8)
META = torch.device("meta")


def refused(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"logits": [1.0]}, TypeError, "logits: got list, a torch.Tensor is accepted"),
        ({"logits": torch.zeros(8)}, ValueError, "logits: got 1 dimensions (8,), 2 are accepted"),
        ({"logits": LOGITS.int()}, TypeError, "logits: got dtype int32, accepted: bfloat16, float16, float32"),
        ({"logits": torch.zeros(8, 2).T}, ValueError, "logits: got stride 2 in the last dimension, 1 is accepted"),
        (
            {"logits": torch.zeros(2, 1025)},
            ValueError,
            "number of experts (logits.shape[1]): got 1025, an integer from 1",
        ),
        ({"top_k": 9}, ValueError, "top_k: got 9, an integer from 1 to 8 is accepted"),
        ({"top_k": 0}, ValueError, "top_k: got 0, an integer from 1 to 8 is accepted"),
        ({"top_k": 2.0}, TypeError, "top_k: got float, an integer from 1 to 8 is accepted"),
        ({"scoring": "tanh"}, ValueError, "scoring: got 'tanh', accepted: 'sigmoid', 'softmax', 'sqrt_softplus'"),
        ({"num_groups": 3}, ValueError, "num_groups: got 3, a divisor of the number of experts, 8, is accepted"),
        ({"num_groups": 0}, ValueError, "num_groups: got 0, an integer from 1 to 8 is accepted"),
        ({"num_groups": 4, "top_k_groups": 5}, ValueError, "top_k_groups: got 5, an integer from 1 to 4 is accepted"),
        ({"group_rank": "mean"}, ValueError, "group_rank: got 'mean', accepted: None, 'max', 'top2_sum'"),
        ({"group_fill": 1.0}, ValueError, "group_fill: got 1.0, accepted: None, 0.0, -inf"),
        ({"num_shared": -1}, ValueError, "num_shared: got -1, an integer from 0 to 1024 is accepted"),
        ({"bias": torch.zeros(7)}, ValueError, "bias: got shape (7,), (8) is accepted"),
        ({"bias": torch.zeros(8).half()}, TypeError, "bias: got dtype float16, accepted: float32"),
        ({"bias": torch.zeros(8, device=META)}, ValueError, "bias: got a tensor on meta, all arguments must be on cpu"),
        (
            {"bias": torch.zeros(8).requires_grad_()},
            NotImplementedError,
            "route has no backward and bias requires grad",
        ),
    ],
)
def test_route_refuses(changes, error, text):
    arguments = {"logits": LOGITS, "top_k": 2} | changes
    refused(lambda: route(**arguments), error, text)


TABLE, TOKEN_IDS = torch.zeros(5, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"logits": torch.zeros(8)}, ValueError, "logits: got 1 dimensions (8,), 2 are accepted"),
        ({"table": TABLE[0]}, ValueError, "table: got 1 dimensions (3,), 2 are accepted"),
        ({"table": TABLE.float()}, TypeError, "table: got dtype float32, accepted: int32, int64"),
        ({"table": TABLE[:0]}, ValueError, "rows of the table (table.shape[0]): got 0, an integer from 1"),
        ({"table": TABLE[:, :0]}, ValueError, "experts a token (table.shape[1]): got 0, an integer from 1 to 1024"),
        ({"table": TABLE.to(META)}, ValueError, "table: got a tensor on meta, all arguments must be on cpu"),
        ({"table": TABLE + 8}, ValueError, "table[token_ids]: got values from 8 to 8, accepted: 0 to 7 (logits have 8"),
        ({"token_ids": TOKEN_IDS[:1]}, ValueError, "token_ids: got shape (1,), (2) is accepted"),
        ({"token_ids": TOKEN_IDS + 5}, ValueError, "token_ids: got values from 5 to 5, accepted: 0 to 4 (table has 5"),
        ({"token_ids": TOKEN_IDS - 1}, ValueError, "token_ids: got values from -1 to -1, accepted: 0 to 4"),
        ({"token_ids": TOKEN_IDS.short()}, TypeError, "token_ids: got dtype int16, accepted: int32, int64"),
        ({"scoring": "tanh"}, ValueError, "scoring: got 'tanh', accepted: 'sigmoid', 'softmax', 'sqrt_softplus'"),
        ({"num_shared": 1.0}, TypeError, "num_shared: got float, an integer from 0 to 1024 is accepted"),
    ],
)
def test_hash_route_refuses(changes, error, text):
    arguments = {"logits": LOGITS, "table": TABLE, "token_ids": TOKEN_IDS} | changes
    refused(lambda: hash_route(**arguments), error, text)
