"""What a public op is in the catalogue, and what its examples share."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import mla_kernels as mk

EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 32, 16
LATENT, ROPE, HEADS, PAGE = 32, 16, 3, 4
TABLE = 8  # pages of a sequence


@dataclass
class Call:
    """One public function.

    ``run(**tensors)`` calls it, makes caches inside and returns what it computes and what it writes. ``example(n)``
    gives the tensors, ``sizes`` which of their axes grow with n: name -> {axis: the name of the size}.
    """

    run: Callable
    example: Callable[[int], dict[str, torch.Tensor]]
    sizes: dict[str, dict[int, str]]
    leaves: tuple[str, ...] = field(default=())  # those with a gradient


CALLS: dict[str, Call] = {}


def enter(name, sizes, run, example, leaves=()):
    """``sizes`` as a string names the tensors whose axis 0 is the number of tokens."""
    axes = {key: {0: "tokens"} for key in sizes.split()} if isinstance(sizes, str) else sizes
    CALLS[name] = Call(run, example, axes, leaves)


def call(name, sizes, leaves=()):
    """:func:`enter` what the function below gives, (run, example)."""
    return lambda pair: enter(name, sizes, *pair(), leaves)


def ids_of(tokens, experts=EXPERTS, top_k=TOP_K):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].int().contiguous()
    ids[0, 0] = -1
    return ids


def rope_tables(width=ROPE):
    angles = torch.rand(128, width // 2) * 6
    return {"cos": angles.cos(), "sin": angles.sin()}


def bounds(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def latent_widths(layout):
    """The widths of the latent and of what is beside it in the caches of these examples."""
    if layout == "fp8_v4":
        return 256, 0
    return (128 if layout else LATENT), ROPE


def latent_data(pages, layout):
    latent_dim, rope_dim = latent_widths(layout)
    cache = mk.LatentCache.allocate(
        pages, PAGE, latent_dim=latent_dim, rope_dim=rope_dim, dtype=torch.bfloat16, layout=layout
    )
    values = torch.randn(pages * PAGE, cache.width).bfloat16()
    slots = torch.arange(pages * PAGE)
    mk.scatter_tokens(values[:, : cache.latent_dim], values[:, cache.latent_dim :], slots, cache)
    return cache.data
