"""Experts on fp8 blocks, int8 (products of codes, too), int4 and MXFP4, beside our bf16; fp8 blocks beside SGLang
and DeepGEMM, too."""

import functools
from functools import partial

import torch

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants
from mla_kernels.device.cases.experts import (
    DEEPGEMM_TOKENS,
    LOOKED_AT,
    Routing,
    exact_experts,
    sglang,
    sizes,
    weights_of,
)

BF16 = "mla_kernels, bf16"
QUANTISED = 4
"""Experts that are quantised; they recur in memory up to the full number, so traffic is real and values are not."""
LIMITS = {"fp8_block": 1e-1, "int8_w8a8": 5e-2}
"""Errors where activations are rounded twice: to e4m3, which made up to 0.06 on a CPU, or to int8."""


@functools.lru_cache(maxsize=1)
def quantised(shape: str, format: str, place: Place) -> tuple[mk.ExpertWeights, mk.ExpertWeights]:
    """Four experts, and the full number of them."""
    experts, hidden, inner, _ = sizes(shape, place)
    gate_up = place.weight(QUANTISED, 2 * inner, hidden, scale=hidden**-0.5)
    four = mk.ExpertWeights.quantise(gate_up, place.weight(QUANTISED, hidden, inner, scale=inner**-0.5), format)
    every = {}
    for name, tensor in four.tensors().items():
        if place.values:
            every[name] = tensor.repeat(experts // QUANTISED, *[1] * (tensor.dim() - 1))
        else:
            every[name] = torch.empty(experts, *tensor.shape[1:], dtype=tensor.dtype, device=place.device)
    return four, mk.ExpertWeights(format, **every, group_size=four.group_size)


def experts(shape: str, format: str, tokens: int, place: Place, peers) -> Problem:
    tokens = place.size(tokens, min(tokens, 5))
    _, width, _, _ = sizes(shape, place)
    four, every = quantised(shape, format, place)
    hidden, routing = place.normal(tokens, width), Routing(shape, tokens, place)
    gate_up, down = weights_of(shape, place)

    def exact() -> torch.Tensor:
        first, second = four.dequantise(torch.float32)
        return exact_experts(hidden, routing, lambda e: (first[e % QUANTISED], second[e % QUANTISED]))

    def exact_bf16() -> torch.Tensor:
        return exact_experts(hidden, routing, lambda e: (gate_up[e].float(), down[e].float()))

    def call(**more):
        return lambda copy: mk.fused_experts(hidden, every, routing.weights, routing.ids[copy], **more)

    problem = Problem(
        call(), exact, lambda out: out[:LOOKED_AT],
        bytes=every.bytes_per_parameter * routing.parameters + 2 * hidden.nbytes, flops=routing.flops,
        copies=routing.copies, limit=LIMITS.get(format, 2e-2),
    )  # fmt: skip
    variants(problem, mk.fused_experts, call, place, carried=format == "fp8_block")
    problem.add(
        BF16, lambda copy: mk.fused_moe(hidden, gate_up, down, routing.weights, routing.ids[copy]),
        "own", exact=exact_bf16,
    )  # fmt: skip
    if format == "fp8_block":
        codes = [codes.view(torch.float8_e4m3fn) for codes in (every.gate_up, every.down)]
        scales = every.gate_up_scale, every.down_scale
        if peers.sglang:
            sglang(problem, peers.sglang, hidden, *codes, routing, scales)
        if peers.deepgemm and tokens >= DEEPGEMM_TOKENS:
            run = peers.deepgemm.experts_fp8
            problem.add("DeepGEMM", lambda copy: run(hidden, *codes, *scales, routing.weights, routing.ids[copy]))
    return problem


_ASKED = {
    ("int8_w8a8", 4096): {BF16: 1.3},
    **{(format, tokens): {BF16: least} for format in ("int4", "mxfp4")
       for tokens, least in ((1, 2.5), (64, 1.5), (4096, 0.9))},
}  # fmt: skip


def _case(format: str, shape: str, tokens: int, priority: int) -> Case:
    peers = {"SGLang": 1.0, "DeepGEMM": 1.0} if format == "fp8_block" else {}
    return Case(
        f"{format} {shape} t{tokens}", "quant", f"experts, {format}",
        min(2, priority + (shape != "v3tp8") + (format != "fp8_block")), partial(experts, shape, format, tokens),
        peers or _ASKED.get((format, tokens), {}),
    )  # fmt: skip


CASES = (
    *(
        _case(format, shape, tokens, priority)
        for shape in ("v3tp8", "v2lite")
        for format in ("fp8_block", "int8_w8a8", "int8", "int4", "mxfp4")
        for tokens, priority in ((1, 0), (4096, 0), (64, 1), (1024, 1))
    ),
    _case("fp8_block", "v3tp8", 16384, 2),
    *(_case("fp8_block", "v3ep", tokens, 1) for tokens in (1, 64, 4096, 16384)),
)
