"""Dispatch, combine and the fused experts, at DeepSeek-V2-Lite's sizes."""

import functools

import pytest
import torch
import torch.nn.functional as F

from mla_kernels import combine, dispatch, expert_ffn, fused_moe, route
from mla_kernels.cpu import packed, prepack
from mla_kernels.reference import moe as reference

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 6, 2048, 1408
TOKENS = (1, 16, 256, 1024)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@functools.lru_cache(maxsize=1)
def expert_weights(dtype):
    """gate_up and down; one random expert, rolled by another count for each, since 5e8 random numbers take seconds."""

    def stack(rows, columns):
        one = (torch.randn(rows, columns) * columns**-0.5).to(dtype)
        return torch.stack([one.roll(37 * expert) for expert in range(EXPERTS)])

    return stack(2 * INTERMEDIATE, HIDDEN), stack(HIDDEN, INTERMEDIATE)


def plain_dispatch(ids, experts):
    order = ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    counts = F.one_hot(ids.flatten().long(), experts).sum(0)
    return order, order // ids.shape[1], inverse, F.pad(counts.cumsum(0), (1, 0))


@pytest.mark.parametrize("tokens", [1, 1024])
def test_dispatch(race, tokens):
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    exact = torch.cat(reference.dispatch(ids, EXPERTS)).double()
    race(
        lambda: dispatch(ids, EXPERTS),
        {"torch": lambda: plain_dispatch(ids, EXPERTS)},
        exact,
        pick=lambda result: torch.cat(result).float(),
        nbytes=4 * ids.nbytes,
        flops=0,
    )


@pytest.mark.parametrize("tokens", [1, 1024])
def test_combine(race, tokens):
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    rows, weights = torch.randn(tokens * TOP_K, HIDDEN).bfloat16(), torch.rand(tokens, TOP_K)
    dispatched = dispatch(ids, EXPERTS)
    inverse = dispatched.inverse.long()
    race(
        lambda: combine(rows, weights, dispatched),
        {"torch": lambda: (rows[inverse].view(tokens, TOP_K, -1) * weights.unsqueeze(-1)).sum(1).bfloat16()},
        reference.combine(rows.double(), weights.double(), dispatched),
        nbytes=rows.nbytes * (TOP_K + 1) / TOP_K,
        flops=2 * rows.numel(),
    )


def exact_rows(hidden, gate_up, down, weights, ids):
    """fp64 result of these tokens, expert by expert to save memory."""
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token].double() @ gate_up[expert].double().t()).chunk(2, -1)
        out = (F.silu(gate) * up) @ down[expert].double().t()
        total.index_add_(0, token, out * weights[token, slot, None].double())
    return total


def plain_moe(hidden, gate_up, down, weights, ids):
    total = torch.zeros(hidden.shape)
    for expert in range(gate_up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, down[expert])
            total.index_add_(0, token, out * weights[token, slot, None])
    return total.to(hidden.dtype)


def hf_module(gate_up, down):
    """transformers' module of these experts."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    with torch.device("meta"):
        module = DeepseekV3Experts(config)
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(weight) for weight in (gate_up, down))
    return module


def hf_experts(gate_up, down, hidden, weights, ids):
    """transformers' experts over the same weights, one function for each experts_implementation."""
    module = hf_module(gate_up, down)
    config = module.config

    def run(implementation):
        def step():
            config._experts_implementation_internal = implementation
            return module(hidden, ids.long(), weights)

        return step

    names = ["eager", "grouped_mm"]
    if hidden.shape[0] == 1:
        names.append("batched_mm")  # copies the weights of every (token, slot) pair: seconds from 16 tokens on
    return {f"HF {name}": run(name) for name in names}


@pytest.fixture(params=["plain", "prepacked"])
def weights_as(request):
    """Prepares expert weights; "prepacked" with a second copy in oneDNN's layout."""

    def prepare(gate_up, down):
        if request.param == "prepacked":
            prepack(gate_up=gate_up, down=down)

    yield prepare
    packed._copies.clear()


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
def test_fused_moe(race, weights_as, dtype, tokens):
    gate_up, down = expert_weights(dtype)
    weights_as(gate_up, down)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    weights, ids = route(torch.randn(tokens, EXPERTS), TOP_K)
    args = (hidden, gate_up, down, weights, ids)
    sample = slice(0, 4)
    used = ids.unique().numel()
    expert_bytes = 3 * INTERMEDIATE * HIDDEN * dtype.itemsize
    race(
        lambda: fused_moe(*args),
        {"torch": lambda: plain_moe(*args), **hf_experts(gate_up, down, hidden, weights, ids)},
        exact_rows(hidden[sample], gate_up, down, weights[sample], ids[sample]),
        pick=lambda result: result[sample],
        nbytes=used * expert_bytes + 2 * hidden.nbytes,
        flops=6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
    )


@functools.lru_cache(maxsize=1)
def moved_experts(dtype):
    """What ``enable(model, prepack=True)`` makes of a layer's experts."""
    from mla_kernels.compat.transformers_packed import pack

    module = hf_module(*(weight.clone() for weight in expert_weights(dtype)))
    pack([module])
    return module


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
def test_enabled_experts(race, dtype, tokens):
    """Experts of a model after ``enable(model, prepack=True)``. Calls of a contestant follow one another with other
    tokens, so that they read other experts than the call before did."""
    from mla_kernels.compat.transformers_experts import experts

    gate_up, down = expert_weights(dtype)
    module = moved_experts(dtype)
    problems = []
    for _ in range(8 if tokens == 1 else 2):
        hidden = torch.randn(tokens, HIDDEN).to(dtype)
        weights, ids = route(torch.randn(tokens, EXPERTS), TOP_K)
        problems.append((hidden, weights, ids, hf_experts(gate_up, down, hidden, weights, ids)))
    names = [name for name in problems[0][3] if name != "HF batched_mm"]
    sample = slice(0, 4)
    hidden, weights, ids, _ = problems[0]

    def over_all(call):
        def run():
            first, *_ = [call(problem) for problem in problems]
            return first

        return run

    race(
        over_all(lambda problem: experts(module, problem[0], problem[2], problem[1])),
        {name: over_all(lambda problem, name=name: problem[3][name]()) for name in names},
        exact_rows(hidden[sample], gate_up, down, weights[sample], ids[sample]),
        pick=lambda result: result[sample],
        nbytes=ids.unique().numel() * 3 * INTERMEDIATE * HIDDEN * dtype.itemsize + 2 * hidden.nbytes,
        flops=6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
        calls=len(problems),
    )


def test_expert_ffn(race):
    gate_up, down = expert_weights(torch.bfloat16)
    hidden = torch.randn(16, HIDDEN).bfloat16()
    dispatched = dispatch(torch.rand(16, EXPERTS).topk(TOP_K).indices.int(), EXPERTS)
    tokens, ends = dispatched.tokens.long(), dispatched.offsets[1:]

    def plain():
        gate, up = F.grouped_mm(hidden[tokens], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)

    used = (dispatched.offsets.diff() > 0).nonzero().flatten()
    first = int(used[0])
    rows = slice(0, int(dispatched.offsets[first + 1]))
    gate, up = (hidden[tokens[rows]].double() @ gate_up[first].double().t()).chunk(2, -1)
    race(
        lambda: expert_ffn(hidden, gate_up, down, dispatched),
        {"torch grouped_mm": plain} if hasattr(F, "grouped_mm") else {},
        (F.silu(gate) * up) @ down[first].double().t(),
        pick=lambda result: result[rows],
        nbytes=used.numel() * 3 * INTERMEDIATE * HIDDEN * 2 + tokens.numel() * HIDDEN * 4,
        flops=6 * INTERMEDIATE * HIDDEN * tokens.numel(),
    )
