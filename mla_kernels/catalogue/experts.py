"""Mixtures of experts."""

import torch

import mla_kernels as mk
from mla_kernels.catalogue.calls import EXPERTS, HIDDEN, INNER, TOP_K, bounds, call, enter, ids_of


def _experts(dtype=torch.float32, hidden=HIDDEN, inner=INNER):
    gate_up = torch.randn(EXPERTS, 2 * inner, hidden) * hidden**-0.5
    return {"gate_up": gate_up.to(dtype), "down": (torch.randn(EXPERTS, hidden, inner) * inner**-0.5).to(dtype)}


def _layer(n):
    return {"hidden": torch.randn(n, HIDDEN), **_experts(), "weights": torch.rand(n, TOP_K), "ids": ids_of(n)}


_LAYER = "hidden weights ids"


def _fused(**options):
    return lambda **tensors: mk.fused_moe(**tensors, **options), _layer


_LEAVES = ("hidden", "gate_up", "down", "weights")
_TYPED = {"elements": "hidden gate_up down", "results": "out"}
enter("fused_moe", _LAYER, *_fused(), _LEAVES, **_TYPED)
enter("fused_moe that computes again", _LAYER, *_fused(recompute=True), _LEAVES, **_TYPED)
enter("fused_moe weighted at the input", _LAYER, *_fused(weight_at="input"), _LEAVES, **_TYPED)


@call(
    "fused_moe with biases and a clamp", _LAYER, (*_LEAVES, "gate_up_bias", "down_bias"),
    elements="hidden gate_up down gate_up_bias down_bias", results="out",
)  # fmt: skip
def _():
    activation = mk.Activation("gpt_oss", 0.8, interleaved=True)

    def run(**tensors):
        return mk.fused_moe(**tensors, activation=activation, weight_at="activation")

    def example(n):
        biases = {"gate_up_bias": torch.randn(EXPERTS, 2 * INNER), "down_bias": torch.randn(EXPERTS, HIDDEN)}
        return _layer(n) | biases

    return run, example


def _quantised(form):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        codes = mk.ExpertWeights.quantise(*_experts(torch.bfloat16, 128, 128).values(), form)

    def run(hidden, weights, ids):
        return mk.fused_experts(hidden, codes.to(hidden.device), weights, ids)

    def example(n):
        return {"hidden": torch.randn(n, 128).bfloat16(), "weights": torch.rand(n, TOP_K), "ids": ids_of(n)}

    return run, example


for _form in ("plain", "int8", "int8_w8a8", "int4", "mxfp4", "fp8_block"):
    enter(f"fused_experts of {_form}", _LAYER, *_quantised(_form), results="out")


@call("expert_ffn and combine", _LAYER, **_TYPED)
def _():
    def run(hidden, gate_up, down, weights, ids):
        dispatched = mk.dispatch(ids, EXPERTS)
        return mk.combine(mk.expert_ffn(hidden, gate_up, down, dispatched), weights, dispatched)

    return run, _layer


@call("dispatch", "ids", results="order tokens inverse offsets", exact="order tokens inverse offsets")
def _():
    return lambda ids: tuple(mk.dispatch(ids, EXPERTS)), lambda n: {"ids": ids_of(n)}


@call("permute", "hidden ids", ("hidden",), elements="hidden", results="rows", exact="rows")
def _():
    def run(hidden, ids):
        return mk.permute(hidden, mk.dispatch(ids, EXPERTS))

    return run, lambda n: {"hidden": torch.randn(n, HIDDEN), "ids": ids_of(n)}


@call("unpermute", "hidden weights ids", ("hidden", "weights"), elements="hidden", results="weighted sums")
def _():
    def run(hidden, weights, ids):
        dispatched = mk.dispatch(ids, EXPERTS)
        rows = mk.permute(hidden, dispatched)
        return mk.unpermute(rows, dispatched, weights), mk.unpermute(rows, dispatched, top_k=TOP_K)

    return run, lambda n: {"hidden": torch.randn(n, HIDDEN), "weights": torch.rand(n, TOP_K), "ids": ids_of(n)}


@call("align_blocks", "ids", results="order experts total", exact="order experts total")
def _():
    return lambda ids: mk.align_blocks(ids, EXPERTS, 4), lambda n: {"ids": ids_of(n)}


@call("expert_load and update_bias", "ids", results="bias load", exact="bias load")
def _():
    def run(ids, bias):
        bias, load = bias.clone(), mk.expert_load(ids, EXPERTS)
        mk.update_bias(bias, load, 0.1)
        return bias, load

    return run, lambda n: {"ids": ids_of(n), "bias": torch.randn(EXPERTS)}


@call("route", "logits", ("logits",), elements="logits", results="weights ids")
def _():
    def run(logits, bias):
        return mk.route(logits, 3, bias=bias, num_groups=4, top_k_groups=2, routed_scale=2.5, num_shared=1)

    return run, lambda n: {"logits": torch.randn(n, 16), "bias": torch.randn(16)}


@call("hash_route", "logits token_ids", ("logits",), elements="logits", results="weights ids", exact="ids")
def _():
    def example(n):
        table = torch.rand(13, 16).argsort(1)[:, :3].contiguous()
        return {"logits": torch.randn(n, 16), "table": table, "token_ids": torch.randint(0, 13, (n,))}

    return mk.hash_route, example


@call("balance_loss", "logits ids", ("logits",), elements="logits", results="of_all of_sequences")
def _():
    def run(logits, ids, cu_seqlens):
        return mk.balance_loss(logits, ids), mk.balance_loss(logits, ids, cu_seqlens=cu_seqlens, scoring="softmax")

    def example(n):
        return {"logits": torch.randn(n, EXPERTS), "ids": ids_of(n), "cu_seqlens": bounds(1, n - 2)}

    return run, example
