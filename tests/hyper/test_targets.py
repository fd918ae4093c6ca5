"""How often hyper-connections launch, and what they ask of memory."""

import pytest
import torch

import mla_kernels as mk
from mla_kernels import launch, tiles
from mla_kernels.hyper.project import cuts
from mla_kernels.targets.traffic import Traffic
from tests.hyper.problems import make

LAUNCHES = {"hyper_pre": 2, "hyper_post": 1, "hyper_post_pre": 2, "hyper_head": 2, "hyper_head of the mean": 1}


def calls(p):
    head = p.fn[:4], p.base[:4], p.scale[:1]
    return {
        "hyper_pre": lambda: mk.hyper_pre(p.streams, *p.weights, norm_weight=p.norm_weight),
        "hyper_post": lambda: mk.hyper_post(*p.written),
        "hyper_post_pre": lambda: mk.hyper_post_pre(*p.written, *p.weights, norm_weight=p.norm_weight),
        "hyper_head": lambda: mk.hyper_head(p.streams, *head, norm_weight=p.norm_weight),
        "hyper_head of the mean": lambda: mk.hyper_head(p.streams, collapse="mean"),
    }


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    p = make(3, 32, device="meta")
    with launch.on_cpu("torch", "h200"), tiles.record() as recording, torch.no_grad():
        calls(p)[name]()
    assert len(recording) == LAUNCHES[name]


@pytest.mark.parametrize("name, bound", [("hyper_pre", 1.4), ("hyper_post", 1.1), ("hyper_post_pre", 1.35)])
@pytest.mark.parametrize("hidden", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_traffic(hidden, name, bound):
    """Bytes that all launches request for a tile of 16 tokens, over those of each input and output once and of the
    partial sums. What is above 1: the streams are read again where they are collapsed."""
    tokens = 16
    p = make(tokens, hidden, dtype=torch.bfloat16)
    row, small = 2 * hidden, 4 * (4 + 16)  # a row, post and comb, in bytes a token
    weights = 4 * (24 * 4 * hidden + 24 + 3 + hidden)
    minimum = {
        "hyper_pre": tokens * (5 * row + small) + weights,
        "hyper_post": tokens * (9 * row + small),
        "hyper_post_pre": tokens * (10 * row + 2 * small) + weights,
    }[name]
    partial = 0 if name == "hyper_post" else 2 * 4 * 25 * cuts(hidden) * tokens
    with launch.on_cpu("interpret"), Traffic() as traffic:
        calls(p)[name]()
    assert traffic.requested <= bound * minimum + partial, f"{traffic.requested / (minimum + partial):.2f}"
