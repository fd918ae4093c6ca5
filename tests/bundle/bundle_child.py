"""``python -m tests.bundle.bundle_child BUNDLE JSON``: a model's calls over the stub driver, with a bundle loaded.

JSON: ``model``, ``tp``, ``device``, ``steps`` {operation: [sizes]}, ``layers`` [tokens of steps and prompts],
``outside`` (as steps: what the bundle does not hold).
Prints as JSON how long loading took, what Triton compiled, what the bundle gave, and for each call that took kernels
from it the seconds of the call for each of them.
"""

import json
import logging
import sys
import time
from unittest import mock

import torch
import triton

import tests.launch.cuda_recorder  # noqa: F401  (puts the stub driver under Triton)
from mla_kernels import bundle, nn
from mla_kernels.autotune.making import Make
from mla_kernels.autotune.models import geometry
from mla_kernels.autotune.problems import OPERATIONS
from mla_kernels.latent.cache import LatentCache
from mla_kernels.launch import on_cpu


class Bare(Make):
    """CPU tensors of no meaning, which the stub driver's kernels do not read."""

    def __init__(self):
        super().__init__("cpu", torch.bfloat16)
        self.bare = True

    def integers(self, *shape, below):
        return torch.zeros(shape, dtype=torch.int32)

    def angles(self, rope):
        return torch.empty(4096, rope // 2), torch.empty(4096, rope // 2)


def calls(g, steps, layers, make):
    """Each call in turn; the tensors of one are freed before the next are made."""
    for name, sizes in steps.items():
        for size in sizes:
            with mock.patch("torch.zeros", torch.empty):  # pages that nobody reads cost no memory
                run = OPERATIONS[name].build(g, size, make).run
            yield run
    for tokens in layers:
        yield from layer_calls(g, tokens, make)


def layer_calls(g, tokens, make):
    """A decoding step of so many sequences, and a prompt of as many tokens, through one layer."""
    with torch.device("meta"):
        config = nn.AttentionConfig(num_heads=g.heads)
        moe = nn.MoEConfig(intermediate_size=g.inner, shared_intermediate_size=g.inner)
        parts = nn.LatentAttention(config), nn.MoE(moe, expert_format="fp8_block")
    attention, experts = (part.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False) for part in parts)
    cache = LatentCache.allocate(7 * tokens + 3, 64, device="cpu")
    angles, table = make.angles(64), torch.zeros(tokens, 7, dtype=torch.int32)

    def decode():
        hidden, places = make.normal(tokens, 1, g.hidden), torch.zeros(tokens, 1, dtype=torch.int64)
        lengths = torch.full((tokens,), 9, dtype=torch.int32)
        experts(attention.decode(hidden, *angles, places, places, cache, table, lengths))

    def prefill():
        hidden, places = make.normal(1, tokens, g.hidden), torch.zeros(1, tokens, dtype=torch.int64)
        experts(attention.prefill(hidden, *angles, places, places, cache))

    return decode, prefill


def main(path: str, told: dict) -> dict:
    logging.basicConfig(stream=sys.stderr)
    compiled, firsts = [], []

    def listener(*, src, cache_hit, **_):
        if not cache_hit:
            compiled.append(src.name)

    triton.knobs.compilation.listener = listener
    began = time.perf_counter()
    loaded = bundle.load(path)
    seconds = time.perf_counter() - began
    g, make = geometry(told["model"]).on(told["tp"]), Bare()
    with on_cpu("cuda", told["device"]), torch.no_grad():
        for call in calls(g, told["steps"], told.get("layers", ()), make):
            before, began = sum(loaded.found.values()), time.perf_counter()
            call()
            launched = sum(loaded.found.values()) - before
            if launched:
                firsts.append((time.perf_counter() - began) / launched)
            del call
        said = {
            "load seconds": seconds, "compiled": list(compiled), "found": dict(loaded.found),
            "missed": dict(loaded.missed), "seconds a kernel": firsts,
        }  # fmt: skip
        compiled.clear()
        for call in calls(g, told.get("outside", {}), (), make):
            call()
    return said | {"outside": {"compiled": compiled, "missed": loaded.missed}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
