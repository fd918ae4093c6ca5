"""Writing latents: norm, rotation and write, with the projection, and the whole prologue of a layer."""

from functools import partial

import torch
from torch.nn.functional import linear

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants
from mla_kernels.device.cases.decode import LATENT, PAGE, ROPE, WIDTH

NOPE = 128


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    values = x.float()
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Written:
    """A cache for so many tokens, where each goes, the norm's weight and the angles."""

    def __init__(self, tokens: int, place: Place):
        self.place, self.tokens = place, tokens
        self.cache = mk.LatentCache.allocate(tokens // PAGE + 1, PAGE, device=place.device)
        angles = 6 * place.uniform(max(tokens, 64), ROPE // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.arange(tokens, device=place.device)
        self.slots = place.order(tokens)
        self.norm = place.uniform(LATENT, low=0.5).bfloat16()
        self.places = self.cos, self.sin, self.positions, self.slots, self.cache
        """The last arguments of every op that writes."""
        self.other = torch.zeros_like(self.cache.data)

    def plain(self, kv_a: torch.Tensor, weight: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """torch's write of kv_a [tokens, 576] to ``data``, which it returns."""
        latent, key = kv_a.split((LATENT, ROPE), -1)
        key = rotate(key, self.cos[self.positions], self.sin[self.positions])
        data.view(-1, WIDTH)[self.slots] = torch.cat((norm(latent, weight), key), -1)
        return data

    def clear(self) -> None:
        self.cache.data.zero_()
        self.other.zero_()

    def rows(self, data: torch.Tensor) -> torch.Tensor:
        """[tokens, 576] of what was written."""
        return data.reshape(-1, WIDTH)[self.slots]

    def exact(self, kv_a: torch.Tensor) -> torch.Tensor:
        """What must be written of kv_a in float32."""
        return self.rows(self.plain(kv_a.float(), self.norm.float(), torch.zeros_like(self.other, dtype=torch.float32)))


def write(tokens: int, place: Place, peers) -> Problem:
    at = Written(place.size(tokens, min(tokens, 5)), place)
    kv_a = place.normal(at.tokens, WIDTH)

    def call(**more):
        def run(copy: int):
            mk.write_latent(kv_a, at.norm, *at.places, rope="interleaved", **more)
            return at.cache.data

        return run

    problem = Problem(
        call(), lambda: at.exact(kv_a), at.rows, bytes=2 * kv_a.nbytes, host=at.tokens == 1, reset=at.clear
    )
    variants(problem, mk.write_latent, call, place)
    problem.add("torch", lambda copy: at.plain(kv_a, at.norm, at.other))
    return problem


def compress(tokens: int, place: Place, peers) -> Problem:
    at, width = Written(place.size(tokens, min(tokens, 5)), place), place.size(7168, 256)
    copies = 8
    hidden = place.normal(at.tokens, width)
    weights = [place.normal(WIDTH, width, scale=width**-0.5) for _ in range(copies)]

    def call(**more):
        def run(copy: int):
            mk.compress_latent(hidden, weights[copy], at.norm, *at.places, rope="interleaved", **more)
            return at.cache.data

        return run

    def in_two(copy: int):
        mk.write_latent(hidden @ weights[copy].t(), at.norm, *at.places, rope="interleaved")
        return at.cache.data

    problem = Problem(
        call(), lambda: at.exact(hidden.float() @ weights[0].float().t()), at.rows,
        bytes=weights[0].nbytes + hidden.nbytes + 2 * WIDTH * at.tokens, flops=2 * at.tokens * width * WIDTH,
        copies=copies, host=at.tokens == 1, reset=at.clear,
    )  # fmt: skip
    variants(problem, mk.compress_latent, call, place)
    problem.add("torch", lambda copy: at.plain(hidden @ weights[copy].t(), at.norm, at.other))
    problem.add("torch's product and write_latent", in_two)
    return problem


def prolog(tokens: int, place: Place, peers) -> Problem:
    at = Written(place.size(tokens, min(tokens, 5)), place)
    width, q_lora, heads = place.size(7168, 256), place.size(1536, 96), place.size(128, 16)
    kv_b = place.normal(heads, 2 * NOPE, LATENT, scale=LATENT**-0.5)
    down = place.normal(q_lora + WIDTH, width, scale=width**-0.5)
    q_up = place.normal(heads * (NOPE + ROPE), q_lora, scale=q_lora**-0.5)
    q_norm, hidden = place.uniform(q_lora, low=0.5).bfloat16(), place.normal(at.tokens, width)
    weights = mk.PrologWeights(down, at.norm, q_up, kv_b[:, :NOPE], q_norm)
    matrices = down, q_up, weights.w_uk

    def plain(hidden, down, q_up, w_uk, kv_norm, q_norm, data):
        q_a, kv_a = linear(hidden, down).split((q_lora, WIDTH), -1)
        at.plain(kv_a, kv_norm, data)
        q = linear(norm(q_a, q_norm), q_up).unflatten(-1, (heads, -1))
        absorbed = torch.einsum("thn,hnr->thr", q[..., :NOPE], w_uk)
        cos, sin = (table[at.positions][:, None] for table in (at.cos, at.sin))
        return torch.cat((absorbed, rotate(q[..., NOPE:], cos, sin)), -1)

    def exact() -> torch.Tensor:
        numbers = [x.float() for x in (hidden, *matrices, at.norm, q_norm)]
        return plain(*numbers, torch.zeros_like(at.other, dtype=torch.float32))[:64]

    def call(**more):
        return lambda copy: mk.mla_prolog(hidden, weights, *at.places, rope="interleaved", **more)[0]

    problem = Problem(
        call(), exact, lambda q: q[:64],
        bytes=sum(m.nbytes for m in matrices) + hidden.nbytes + 2 * WIDTH * at.tokens * heads,
        flops=2 * at.tokens * sum(m.numel() for m in matrices), host=at.tokens == 1, reset=at.clear,
    )  # fmt: skip
    variants(problem, mk.mla_prolog, call, place)
    problem.add("torch", lambda copy: plain(hidden, *matrices, at.norm, q_norm, at.other))
    return problem


_ASKED = {"compress_latent": {"torch's product and write_latent": 1.0}}
CASES = tuple(
    Case(f"{op} t{tokens}", "latent", op, priority + (op == "write_latent"), partial(build, tokens), _ASKED.get(op, {}))
    for op, build in (("compress_latent", compress), ("mla_prolog", prolog), ("write_latent", write))
    for tokens, priority in ((1, 0), (4096, 0), (64, 1))
)
