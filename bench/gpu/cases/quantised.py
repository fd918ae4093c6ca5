"""Experts on fp8 blocks, int8, int4 and MXFP4, beside our bf16; fp8 blocks beside SGLang and DeepGEMM, too."""

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

QUANTISED = 4
"""Experts that are quantised; they recur in memory up to the full number, so traffic is real and values are not."""
FP8_LIMIT = 1e-1
"""Errors of fp8 blocks: activations are rounded to e4m3 twice, which made up to 0.06 on a CPU."""


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
        copies=routing.copies, limit=FP8_LIMIT if format == "fp8_block" else 2e-2,
    )  # fmt: skip
    variants(problem, mk.fused_experts, call, place, carried=format == "fp8_block")
    problem.add(
        "mla_kernels, bf16", lambda copy: mk.fused_moe(hidden, gate_up, down, routing.weights, routing.ids[copy]),
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


CASES = tuple(
    Case(
        f"{format} {shape} t{tokens}", "quant", f"experts, {format}",
        min(2, priority + (shape != "v3tp8") + (format != "fp8_block")), partial(experts, shape, format, tokens),
    )
    for shape in ("v3tp8", "v2lite")
    for format in ("fp8_block", "int8", "int4", "mxfp4")
    for tokens, priority in ((1, 0), (4096, 0), (64, 1), (1024, 1))
)  # fmt: skip
