"""Seeded problems for the prolog: weights and places of a layer, as views of larger tensors where models have such."""

from dataclasses import dataclass

import torch

from mla_kernels.latent.absorb import absorb_query, expand_output
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.prolog import PrologWeights, mla_prolog, norm_and_write
from tests.latent.problems import TABLE_ROWS, random_bits

OPS = {
    "absorb_query": absorb_query,
    "expand_output": expand_output,
    "mla_prolog": mla_prolog,
    "norm_and_write": norm_and_write,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of one layer, and how many tokens."""

    tokens: int = 5
    heads: int = 3
    hidden: int = 40
    q_lora: int = 24
    nope: int = 24
    latent: int = 32
    rope: int = 16
    value: int = 20
    page_size: int = 4


V3_HEADS = Sizes(tokens=3, heads=16, hidden=64, q_lora=96, nope=128, latent=512, rope=64, value=128)
GLM_HEADS = Sizes(tokens=2, heads=3, hidden=48, q_lora=32, nope=192, latent=128, rope=64, value=256)


def normal(*shape: int, dtype: torch.dtype, spread: float | None = None) -> torch.Tensor:
    """Numbers that keep the size of what they are multiplied with."""
    return (torch.randn(*shape) * (shape[-1] ** -0.5 if spread is None else spread)).to(dtype)


def head_weights(sizes: Sizes, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """w_uk and w_uv, views of one weight as kv_b_proj has it."""
    kv_b = normal(sizes.heads, sizes.nope + sizes.value, sizes.latent, dtype=dtype).to(device)
    return kv_b[:, : sizes.nope], kv_b[:, sizes.nope :]


def places(sizes: Sizes, device, index_dtype=torch.int64, skipped: int = 0) -> dict[str, torch.Tensor]:
    """cos, sin, positions and slot_mapping, the latter with ``skipped`` tokens of slot -1."""
    slots = torch.randperm(_pages(sizes) * sizes.page_size)[: sizes.tokens]
    slots[torch.randperm(sizes.tokens)[:skipped]] = -1
    angles = torch.rand(TABLE_ROWS, sizes.rope // 2) * 6
    found = {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, TABLE_ROWS, (sizes.tokens,), dtype=index_dtype),
        "slot_mapping": slots.to(torch.int32 if index_dtype == torch.int64 else torch.int64),
    }
    return {name: value.to(device) for name, value in found.items()}


def empty_cache(sizes: Sizes, dtype: torch.dtype, layout: str | None, device) -> LatentCache:
    """A cache of random bits."""
    cache = LatentCache.allocate(
        _pages(sizes), sizes.page_size, latent_dim=sizes.latent, rope_dim=sizes.rope, dtype=dtype, layout=layout
    )
    data = random_bits(*cache.data.shape, dtype=cache.data.dtype)
    return LatentCache(data.to(device), sizes.latent, cache.layout)


def _pages(sizes: Sizes) -> int:
    return -(-(sizes.tokens + 3) // sizes.page_size) + 1


def layer_weights(sizes: Sizes, dtype: torch.dtype, device, *, pair: bool = False, bias: bool = False) -> PrologWeights:
    rows = sizes.q_lora + sizes.latent + sizes.rope
    down = normal(rows, sizes.hidden, dtype=dtype).to(device)
    down_bias = normal(rows, dtype=dtype, spread=1.0).to(device) if bias else None
    if pair:
        down = down.tensor_split((sizes.q_lora,))
        down_bias = down_bias.tensor_split((sizes.q_lora,)) if bias else None
    return PrologWeights(
        tuple(down) if pair else down,
        (normal(sizes.latent, dtype=dtype, spread=0.2) + 1).to(device),
        normal(sizes.heads * (sizes.nope + sizes.rope), sizes.q_lora or sizes.hidden, dtype=dtype).to(device),
        head_weights(sizes, dtype, device)[0],
        (normal(sizes.q_lora, dtype=dtype, spread=0.2) + 1).to(device) if sizes.q_lora else None,
        tuple(down_bias) if pair and bias else down_bias,
    )


def make(op: str, sizes: Sizes = Sizes(), *, dtype=torch.float32, layout=None, rope="half", device="cpu", **options):
    """Arguments by name; those of norm_and_write are columns of one product, as the prolog has them."""
    if op == "expand_output":
        out = normal(sizes.tokens, sizes.heads, sizes.latent + sizes.rope, dtype=dtype, spread=1.0).to(device)
        return {"out": out[..., : sizes.latent], "w_uv": head_weights(sizes, dtype, device)[1]}
    index_options = {name: options.pop(name) for name in ("index_dtype", "skipped") if name in options}
    arguments = {**places(sizes, device, **index_options), "rope": rope}
    if op == "absorb_query":
        del arguments["slot_mapping"]
        q = normal(sizes.tokens, sizes.heads, sizes.nope + sizes.rope, dtype=dtype, spread=1.0).to(device)
        return {"q": q, "w_uk": head_weights(sizes, dtype, device)[0], **arguments}
    arguments["cache"] = empty_cache(sizes, dtype, layout, device)
    if op == "mla_prolog":
        arguments["hidden"] = normal(sizes.tokens, sizes.hidden, dtype=dtype, spread=1.0).to(device)
        return arguments | {"weights": layer_weights(sizes, dtype, device, **options)}
    both = normal(sizes.tokens, sizes.q_lora + sizes.latent + sizes.rope, dtype=dtype, spread=1.0).to(device)
    q_norm, kv_norm = ((normal(n, dtype=dtype, spread=0.2) + 1).to(device) for n in (sizes.q_lora, sizes.latent))
    parts = {"q_a": both[:, : sizes.q_lora], "kv_a": both[:, sizes.q_lora :]}
    return arguments | parts | {"q_norm": q_norm, "kv_norm": kv_norm}


def run(op: str, arguments: dict):
    return OPS[op](**arguments)


def op_arguments(op: str, arguments: dict) -> tuple:
    """In the order of the torch op's schema."""
    known = {"eps": EPS, "batch_invariant": False, **arguments}
    if "cache" in arguments:
        cache = arguments["cache"]
        known |= {"cache": cache.data, "layout": cache.layout.value, "latent_dim": cache.latent_dim}
    if "weights" in arguments:
        weights = arguments["weights"]
        known |= vars(weights) | {"down": list(weights.down_parts), "down_bias": list(weights.bias_parts)}
    return tuple(known[a.name] for a in getattr(torch.ops.mla_kernels, op).default._schema.arguments)
