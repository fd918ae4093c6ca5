"""What a public op is in the catalogue, and what its examples share."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree

import mla_kernels as mk

EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 32, 16
LATENT, ROPE, HEADS, PAGE = 32, 16, 3, 4
TABLE = 8  # pages of a sequence


@dataclass
class Call:
    """One public function.

    ``run(**tensors)`` calls it, makes caches inside and returns what it computes and what it writes. ``example(n)``
    gives the tensors, ``sizes`` which of their axes grow with n: name -> {axis: the name of the size}.

    ``elements`` names the tensors that may all be bfloat16, float16 or float32; where it is empty the example's own
    types are the only ones. ``results`` names what ``run`` returns, in order, or splits it into named parts (see
    :func:`cache_parts`); ``exact`` those of the results that have the same bits on every chip.
    """

    run: Callable
    example: Callable[[int], dict[str, torch.Tensor]]
    sizes: dict[str, dict[int, str]]
    leaves: tuple[str, ...] = field(default=())  # those with a gradient
    elements: tuple[str, ...] = ()
    results: "tuple[str, ...] | Callable[..., dict[str, torch.Tensor]]" = ()
    exact: tuple[str, ...] = ()

    def inputs(self, tokens: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The example, its elements in ``dtype``."""
        tensors = self.example(tokens)
        return {name: x.to(dtype) if dtype and name in self.elements else x for name, x in tensors.items()}

    def named(self, returned) -> dict[str, torch.Tensor]:
        """What ``run`` returned, by name: those of ``results``, or its number."""
        if callable(self.results):
            return self.results(returned)
        leaves = [leaf for leaf in pytree.tree_leaves(returned) if leaf is not None]
        names = self.results or tuple(map(str, range(len(leaves))))
        return dict(zip(names, leaves, strict=True))


CALLS: dict[str, Call] = {}
FORMS: dict[str, Call] = {}
"""Further forms of the same functions, which are called and compared, but neither exported nor compiled."""


def enter(name, sizes, run, example, leaves=(), *, elements="", results="", exact="", among=CALLS):
    """``sizes`` as a string names the tensors whose axis 0 is the number of tokens; other strings are words, too."""
    axes = {key: {0: "tokens"} for key in sizes.split()} if isinstance(sizes, str) else sizes
    named = results if callable(results) else tuple(results.split())
    among[name] = Call(run, example, axes, leaves, tuple(elements.split()), named, tuple(exact.split()))


def call(name, sizes, leaves=(), **more):
    """:func:`enter` what the function below gives, (run, example)."""
    return lambda pair: enter(name, sizes, *pair(), leaves, **more)


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


def cache_parts(latent_dim, layout, *before):
    """``results`` of an op that returns what is named ``before`` and, last, the bytes of a quantised latent cache."""

    def split(returned):
        *first, data = returned if isinstance(returned, tuple) else (returned,)
        cache = mk.LatentCache(data, latent_dim, layout)
        parts = {"codes": cache.latents, "scales": cache.scales}
        return dict(zip(before, first, strict=True)) | parts | {"rope": cache.rope}

    return split


def indexer_parts(head_dim, *before):
    """The same of an indexer's cache."""

    def split(returned):
        *first, data = returned if isinstance(returned, tuple) else (returned,)
        cache = mk.IndexerCache(data, head_dim)
        return dict(zip(before, first, strict=True)) | {"codes": cache.keys, "scales": cache.scales}

    return split


def latent_data(pages, layout, page_size=PAGE, latent_dim=None):
    narrow, rope_dim = latent_widths(layout)
    cache = mk.LatentCache.allocate(
        pages, page_size, latent_dim=latent_dim or narrow, rope_dim=rope_dim, dtype=torch.bfloat16, layout=layout
    )
    values = torch.randn(cache.num_slots, cache.width).bfloat16()
    slots = torch.arange(cache.num_slots)
    mk.scatter_tokens(values[:, : cache.latent_dim], values[:, cache.latent_dim :], slots, cache)
    return cache.data
