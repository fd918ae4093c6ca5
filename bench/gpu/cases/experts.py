"""Experts in bf16 at the widths of DeepSeek-V3 (tensor and expert parallel) and V2-Lite, 1 to 16k tokens."""

import functools
from functools import partial

import torch
from torch.nn.functional import silu

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

SHAPES = {
    "v3tp8": (256, 7168, 256, 8), "v3ep": (32, 7168, 2048, 8), "v2lite": (64, 2048, 1408, 6),
    "glm5tp8": (256, 6144, 256, 8),
}  # fmt: skip
"""Name -> experts, hidden width, width inside, experts a token."""
LOOKED_AT = 8
"""Tokens whose results are held against float32."""
DEEPGEMM_TOKENS = 1024
"""From so many tokens DeepGEMM's contiguous product, which pads every expert to 128 rows, takes part."""


def sizes(shape: str, place: Place) -> tuple[int, int, int, int]:
    return (8, 256, 128, 4) if place.tiny else SHAPES[shape]


@functools.lru_cache(maxsize=1)
def weights_of(shape: str, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, 2 I, H] and down [E, H, I]; kept until another shape is asked for."""
    experts, hidden, inner, _ = sizes(shape, place)
    gate_up = place.normal(experts, 2 * inner, hidden, scale=hidden**-0.5)
    return gate_up, place.normal(experts, hidden, inner, scale=inner**-0.5)


class Routing:
    """Random choices of experts, more than one so that a few tokens do not find theirs in L2."""

    def __init__(self, shape: str, tokens: int, place: Place):
        experts, hidden, inner, top_k = sizes(shape, place)
        self.copies = 8 if tokens <= 16 else 2 if tokens <= 64 else 1
        self.ids = [place.ints(torch.rand(tokens, experts).topk(top_k).indices) for _ in range(self.copies)]
        self.weights = place.uniform(tokens, top_k).softmax(-1)
        self.parameters = int(self.ids[0].unique().numel()) * 3 * hidden * inner
        """Weights of all experts that the first choice reads."""
        self.flops = 6 * hidden * inner * tokens * top_k


def exact_experts(hidden: torch.Tensor, routing: Routing, expert) -> torch.Tensor:
    """The first tokens' results in float32; ``expert(e)`` gives gate_up [2 I, H] and down [H, I] in float32."""
    results = []
    for token in range(min(len(hidden), LOOKED_AT)):
        x, total = hidden[token].float(), 0
        for weight, e in zip(routing.weights[token], routing.ids[0][token].tolist()):
            gate_up, down = expert(e)
            gate, up = (gate_up @ x).chunk(2)
            total = total + weight * (down @ (silu(gate) * up))
        results.append(total)
    return torch.stack(results)


def grouped_mm(hidden, gate_up, down, weights, ids):
    """torch's grouped product, with the gathers around it."""
    tokens, top_k = ids.shape
    flat = ids.view(-1)
    order = flat.long().argsort()
    counts = torch.zeros(len(gate_up), dtype=torch.int32, device=ids.device).scatter_add_(
        0, flat.long(), torch.ones_like(flat)
    )
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(hidden[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = torch._grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(rows)
    back[order] = rows * weights.view(-1)[order, None].to(rows.dtype)
    return back.view(tokens, top_k, -1).sum(1)


def experts(shape: str, tokens: int, place: Place, peers) -> Problem:
    tokens = place.size(tokens, min(tokens, 5))
    _, width, _, _ = sizes(shape, place)
    gate_up, down = weights_of(shape, place)
    hidden, routing = place.normal(tokens, width), Routing(shape, tokens, place)

    def exact() -> torch.Tensor:
        return exact_experts(hidden, routing, lambda e: (gate_up[e].float(), down[e].float()))

    def call(**more):
        return lambda copy: mk.fused_moe(hidden, gate_up, down, routing.weights, routing.ids[copy], **more)

    problem = Problem(
        call(), exact, lambda out: out[:LOOKED_AT], bytes=2 * routing.parameters + 2 * hidden.nbytes,
        flops=routing.flops, copies=routing.copies, host=tokens == 1,
    )  # fmt: skip
    variants(problem, mk.fused_moe, call, place)
    problem.add("torch grouped_mm", lambda copy: grouped_mm(hidden, gate_up, down, routing.weights, routing.ids[copy]))
    if peers.sglang:
        sglang(problem, peers.sglang, hidden, gate_up, down, routing)
    if peers.deepgemm and tokens >= DEEPGEMM_TOKENS:
        run = peers.deepgemm.experts_bf16
        problem.add("DeepGEMM", lambda copy: run(hidden, gate_up, down, routing.weights, routing.ids[copy]))
    return problem


def sglang(problem: Problem, kernels, hidden, gate_up, down, routing: Routing, scales=None) -> None:
    """SGLang's kernels with each of the tiles that it, or its files, would take."""
    for label, first, second in kernels.tiles(gate_up, routing.ids[0].shape, fp8=scales is not None):
        run = partial(
            kernels.experts, hidden, gate_up, down, routing.weights, first=first, second=second, scales=scales
        )
        problem.add(f"SGLang, {label}", lambda copy, run=run: run(ids=routing.ids[copy]))


def training(shape: str, tokens: int, place: Place, peers) -> Problem:
    """Forward, and gradients of hidden states, routing weights and both weights."""
    tokens = place.size(tokens, 5)
    _, width, _, _ = sizes(shape, place)
    gate_up, down = weights_of(shape, place)
    hidden, toward, routing = place.normal(tokens, width), place.normal(tokens, width), Routing(shape, tokens, place)
    ids = routing.ids[0]

    def step(function, toward=toward):
        def run(copy: int, given=(hidden, gate_up, down, routing.weights)):
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in given]
                return torch.autograd.grad(function(*leaves, ids), leaves, toward)

        return run

    def pick(gradients):
        """Of some tokens: gradients of their hidden states and routing weights, each over its own size."""
        of_hidden, _, _, of_weights = gradients
        parts = of_hidden[:LOOKED_AT].float(), of_weights[:LOOKED_AT].float()
        return torch.cat([part.flatten() / part.norm() for part in parts])

    def plain(hidden, gate_up, down, weights, ids):
        rows = []
        for token in range(len(hidden)):
            gate, up = (gate_up[ids[token].long()] @ hidden[token]).chunk(2, -1)
            rows.append(
                (weights[token, :, None] * (down[ids[token].long()] @ (silu(gate) * up)[..., None])[..., 0]).sum(0)
            )
        return torch.stack(rows)

    def exact() -> torch.Tensor:
        some = slice(0, LOOKED_AT)
        first = hidden[some].float(), gate_up.float(), down.float(), routing.weights[some]
        leaves = [tensor.detach().requires_grad_() for tensor in first]
        with torch.enable_grad():
            out = plain(*leaves, ids[some])
            of_hidden, of_weights = torch.autograd.grad(out, (leaves[0], leaves[3]), toward[some].float())
        return pick((of_hidden, None, None, of_weights))

    def call(**more):
        return step(partial(mk.fused_moe, **more))

    problem = Problem(
        call(), exact, pick, bytes=6 * routing.parameters + 4 * hidden.nbytes, flops=3 * routing.flops, graph=False
    )
    variants(problem, mk.fused_moe, call, place, carried=False)
    problem.add("torch grouped_mm", step(grouped_mm))
    return problem


_LEAST = {"SGLang": 0.97, "DeepGEMM": 0.97}
CASES = (
    *(
        Case(
            f"moe {shape} t{tokens}", "moe", "experts, bf16", priority, partial(experts, shape, tokens), _LEAST, 1.10
        )
        for tokens, priority in ((1, 0), (64, 0), (4096, 0), (1024, 1), (16, 1), (256, 1), (16384, 2))
        for shape in ("v3tp8", "v3ep", "v2lite")
    ),
    *(
        Case(f"moe glm5tp8 t{tokens}", "moe", "experts, bf16, GLM-5", 2, partial(experts, "glm5tp8", tokens))
        for tokens in (1, 4096)
    ),
    *(
        Case(
            f"moe {shape} t4096 fwd+bwd", "moe", "experts, forward and backward", priority,
            partial(training, shape, 4096), {"torch grouped_mm": 1.3},
        )
        for shape, priority in (("v3ep", 1), ("v2lite", 1), ("v3tp8", 2))
    ),
)  # fmt: skip
