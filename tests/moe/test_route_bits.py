"""A token's weights and gradients have the same bits alone and in any batch, wherever its logits lie.

The order of a row's sum follows from how the row lies over a GPU's threads, so compiled kernels are held to one layout;
``--backend cuda`` compares bits on a device.
"""

import itertools
import json
import re

import pytest
import torch

from mla_kernels.autotune import search
from mla_kernels.launch import Kernel
from mla_kernels.moe.route.backward import ROUTE_BACKWARD
from mla_kernels.moe.route.hash_route import HASH_ROUTE, hash_route
from mla_kernels.moe.route.route import ROUTE, route
from mla_kernels.moe.route.scores import router_statics
from mla_kernels.targets import compile as compile_module
from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, write_artefacts

SLOW = pytest.mark.slow
KERNELS = (ROUTE, HASH_ROUTE, ROUTE_BACKWARD)
ROUTERS = {
    "V2-Lite": (64, {"top_k": 6, "scoring": "softmax", "renormalize": False}),
    "softmax, groups": (160, {"top_k": 6, "scoring": "softmax", "num_groups": 8, "top_k_groups": 3}),
    "V3": (256, {"top_k": 8, "num_groups": 8, "top_k_groups": 4, "routed_scale": 2.5, "bias": True}),
    "V4": (384, {"top_k": 6, "scoring": "sqrt_softplus", "num_shared": 1, "bias": True}),
    "rows of 120 bytes": (60, {"top_k": 4, "scoring": "softmax"}),
}
SIZES = {"cuda": (1, 2, 3, 7, 64, 255, 1030, 4096), "npu": (1, 2, 3, 7, 64, 255)}


def results(rows, function, table=None):
    """Weights, experts and the gradient of the logits, of rows as they lie."""
    leaf = rows.detach().requires_grad_()
    weights, ids = function(leaf)
    toward = torch.linspace(-1, 2, weights.shape[1], device=rows.device).expand_as(weights)
    return weights.detach(), ids, torch.autograd.grad(weights, leaf, toward)[0]


def lying(rows):
    """The same rows: aligned, one element off, and at a stride that is no multiple of 16 bytes."""
    tokens, experts = rows.shape
    yield rows.contiguous()
    yield torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(tokens, experts)
    yield torch.cat([rows, rows.new_zeros(tokens, 3)], 1)[:, :experts]


def assert_same_bits(backend, device, experts, dtype, function):
    logits = (2 * torch.randn(max(SIZES.get(backend, (5,))), experts)).to(device, dtype)
    want = results(logits, function)
    for tokens in SIZES.get(backend, (1, 2, 3)):
        first = len(logits) - tokens
        for rows in lying(logits[first:]):
            for one, other in zip(results(rows, function), want):
                assert torch.equal(one, other[first:]), f"{tokens} tokens of {len(logits)}, {rows.stride()} apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ROUTERS)
def test_route(backend, device, name, dtype):
    experts, options = ROUTERS[name]
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = torch.randn(experts, device=device)
    if backend == "cpu":  # torch's functions may differ by an ulp between the vectors and the tail of a tensor
        logits = torch.randn(3, experts).to(dtype)
        torch.testing.assert_close(route(logits[2:], **options)[0], route(logits, **options)[0][2:])
    else:
        assert_same_bits(backend, device, experts, dtype, lambda rows: route(rows, **options))


@pytest.mark.parametrize("scoring", ["softmax", "sqrt_softplus"])
def test_hash_route(backend, device, scoring):
    table = torch.randint(0, 60, (50, 6), device=device)

    def function(rows):
        return hash_route(rows, table, torch.full((len(rows),), 7, device=device), scoring=scoring)

    if backend == "cpu":
        logits = torch.randn(3, 60)
        torch.testing.assert_close(function(logits[2:])[0], function(logits)[0][2:])
    else:
        assert_same_bits(backend, device, 60, torch.float32, function)


def sums(text: str, length: int) -> list[tuple]:
    """How rows of this length lie where a TTGIR module adds them up: (elements a thread, threads, warps) along a row,
    and whether threads go along it first. Sums over a token's slots have one term that is not 0, and no order."""
    layouts = dict(re.findall(r"^#(\w+) = #ttg\.blocked<\{(.*)\}>", text, re.M))
    found = []
    for match in re.finditer(r'"tt\.reduce"\(.*?\}\) : \(tensor<\d+x(\d+)xf32, #(\w+)>\)', text, re.S):
        if "arith.addf" in match[0] and int(match[1]) == length:
            parts = {name: json.loads(value) for name, value in re.findall(r"(\w+) = (\[.*?\])", layouts[match[2]])}
            along = tuple(parts[name][1] for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA"))
            found.append((*along, parts["order"][0] == 1))
    return found


def softmax_statics(kernel: Kernel) -> dict:
    if kernel is ROUTE:
        return next(dict(case.statics) for case in ROUTE.cases if case.name == "v2_lite_1")
    return router_statics(64, 6, 0, "softmax", True, 6)


def ttgir(request: Request, scratch) -> str:
    """What the compiler makes before it chooses instructions, kept as reports of compilations are."""
    kept = service.cache_folder() / "ttgir" / compile_module._key(*compile_module._job(request))
    if not kept.exists():
        report = write_artefacts(request, scratch / "kernel")
        assert report.ok, report.problem
        kept.parent.mkdir(parents=True, exist_ok=True)
        (scratch / "kernel.ttgir").replace(kept)
    return kept.read_text()


@pytest.mark.parametrize(
    "target", ["sm_90", "gfx942", pytest.param("sm_80", marks=SLOW), pytest.param("sm_100", marks=SLOW)]
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_row_lies_along_one_warp_in_every_tile_that_can_be_launched(tmp_path, kernel, target):
    chip, statics = CHIPS[target], softmax_statics(kernel)
    tiles = list(search.candidates(kernel, chip, "bf16", statics))
    assert {str(kernel.rule(chip, "bf16", statics, {"tokens": n})) for n in (1, 256, 4096)} <= set(map(str, tiles))
    for dtype, tile in itertools.product(("bf16", "fp32"), tiles):
        text = ttgir(Request(kernel, chip, dtype, statics, tile), tmp_path)
        found = set(sums(text, statics["BLOCK_E"]))
        assert found == {(1, chip.warp_size, 1, True)}


def test_a_warp_compares_in_one_instruction(tmp_path):
    case = next(case for case in ROUTE.cases if case.name == "v3_256")
    tile = ROUTE.rule(CHIPS["sm_90"], "fp32", case.statics, case.sizes)
    report = write_artefacts(Request(ROUTE, CHIPS["sm_90"], "fp32", case.statics, tile), tmp_path / "kernel")
    assert report.ok, report.problem
    listing = (tmp_path / "kernel.sass").read_text()
    groups, pick = 3 * 8, 3  # best, leader and second of 8 groups; best, leader and score of a pick, in a loop
    assert (listing.count("REDUX"), listing.count("SHFL")) == (groups + pick, 0)


@pytest.mark.parametrize("target", [*CHIPS])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_tile_does_not_depend_on_the_number_of_tokens(kernel, target):
    for case in kernel.cases:
        rules = [kernel.rule(CHIPS[target], "bf16", case.statics, {"tokens": tokens}) for tokens in (1, 40, 4096)]
        others = list(search.candidates(kernel, CHIPS[target], "bf16", case.statics))
        assert {tile["BLOCK_T"] for tile in (*rules, *others)} == {rules[0]["BLOCK_T"]}
