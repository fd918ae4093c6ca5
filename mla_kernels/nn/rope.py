"""Rotary positions: tables, and the scale of the scores under an extended context."""

import math
from collections.abc import Mapping

import torch

from mla_kernels.checks import check_choice, check_int
from mla_kernels.cpu import prolog as cpu

__all__ = ["apply_rope", "rope_tables", "softmax_scale", "yarn_mscale"]


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's magnitude correction, 0.1 mscale ln(factor) + 1; 1 where the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(head_dim: int, rope_parameters: Mapping | None = None) -> float:
    """``head_dim ** -0.5``, times m^2 with m = 0.1 mscale_all_dim ln(factor) + 1 under an extended context.

    ``rope_parameters`` as :func:`rope_tables` takes them.
    """
    scale = head_dim**-0.5
    parameters = rope_parameters or {}
    if _kind(parameters) != "default" and parameters.get("mscale_all_dim"):
        scale *= yarn_mscale(parameters["factor"], parameters["mscale_all_dim"]) ** 2
    return scale


def rope_tables(
    rope_dim: int, positions: int, rope_parameters: Mapping, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin tables, fp32 ``[positions, rope_dim // 2]``, as transformers' rotary embeddings compute them.

    Args:
        rope_dim: width of the rotated part.
        positions: rows.
        rope_parameters: ``{"rope_theta": 1e4}``, and for YaRN (arXiv 2309.00071) ``rope_type`` "yarn" with ``factor``,
            ``original_max_position_embeddings`` and optionally ``beta_fast``, ``beta_slow``, ``mscale``,
            ``mscale_all_dim``, ``attention_factor``, ``truncate``: a transformers config's ``rope_parameters``.
            ``type`` is another name of ``rope_type``, as in published files' ``rope_scaling``.

    Raises:
        ValueError: another rope_type, an odd rope_dim, or a parameter that is missing.
    """
    check_int("rope_dim", rope_dim, 2)
    check_int("positions", positions, 0)
    if rope_dim % 2:
        raise ValueError(f"rope_dim: got {rope_dim}, an even width is accepted")
    kind = _kind(rope_parameters)
    check_choice("rope_type", kind, ("default", "yarn"))
    needed = ("rope_theta",) if kind == "default" else ("rope_theta", "factor", "original_max_position_embeddings")
    missing = [name for name in needed if rope_parameters.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters: got no {', '.join(missing)}, which rope_type {kind!r} needs")
    theta, magnitude = rope_parameters["rope_theta"], 1.0
    frequencies = theta ** -(
        torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu") / rope_dim
    )  # [rope_dim / 2]
    if kind == "yarn":
        factor = rope_parameters["factor"]
        kept = _yarn_kept(rope_dim, theta, rope_parameters)
        frequencies = frequencies / factor * (1 - kept) + frequencies * kept
        magnitude = rope_parameters.get("attention_factor")
        mscale, all_dim = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
        if magnitude is None and mscale and all_dim:
            magnitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
        elif magnitude is None:
            magnitude = yarn_mscale(factor)
    angles = (
        torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    )  # [positions, rope_dim / 2]
    return (angles.cos() * magnitude).to(device), (angles.sin() * magnitude).to(device)


def _kind(parameters: Mapping) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _yarn_kept(rope_dim: int, theta: float, parameters: Mapping) -> torch.Tensor:
    """Share of each frequency that YaRN leaves as it is: 1 for fast pairs, 0 for slow ones, a ramp between."""

    def pair_with(rotations: float) -> float:
        length = parameters["original_max_position_embeddings"]
        return rope_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(parameters.get("beta_fast") or 32), pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str) -> torch.Tensor:
    """Rotate the pairs of ``x`` in fp32; differentiable.

    ``x`` is ``[..., rope_dim]``; ``cos`` and ``sin`` broadcast to ``[..., rope_dim // 2]``. ``rope`` says which
    values form a pair and where they go, as in :func:`mla_kernels.write_latent`.
    """
    if x.device.type == "cpu":
        return cpu.rotate(x, cos, sin, rope).to(x.dtype)
    values = x.float()  # without complex numbers, which not every device has
    first, second = values.chunk(2, -1) if rope == "half" else values.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    out = torch.stack(rotated, -1).flatten(-2) if rope == "interleaved" else torch.cat(rotated, -1)
    return out.to(x.dtype)
