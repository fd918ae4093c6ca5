"""Weights as published files store them, under their names, beside the numbers that they stand for."""

import torch

from mla_kernels.reference import quant as reference

E8M0 = torch.float8_e8m0fnu


def words(nibbles):
    """int32 [..., n] of values [..., 8 n] below 16, the first in the lowest bits."""
    packed = (nibbles.long().unflatten(-1, (-1, 8)) << 4 * torch.arange(8)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def bf16(name, weight):
    """As trained."""
    weight = weight.bfloat16()
    return {f"{name}.weight": weight}, weight.double()


def fp8(name, weight, scale="weight_scale_inv", dtype=torch.float32):
    """DeepSeek-V3's: e4m3 and a scale for each 128 x 128 block; V4 calls it ``scale``, in ue8m0."""
    codes, scales = reference.quantise_fp8_block(weight, power_of_two=dtype == E8M0)
    scales = scales.to(dtype)
    true = reference.dequantise_fp8_block(codes, scales.float(), dtype=torch.float64)
    return {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.{scale}": scales}, true


def v4_fp8(name, weight):
    return fp8(name, weight, "scale", E8M0)


def v4_fp4(name, weight):
    """DeepSeek-V4's experts: pairs of e2m1 in int8, the even column in the low nibble; ue8m0 for 32 columns."""
    groups = weight.unflatten(1, (-1, 32))
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 3
    codes = reference.encode_e2m1(torch.ldexp(groups, -exponent[..., None]))
    true = (reference.decode_e2m1(codes) * torch.exp2(exponent.double())[..., None]).flatten(1)
    codes = codes.flatten(1)
    pairs = (codes[:, ::2] | (codes[:, 1::2] << 4)).view(torch.int8)
    return {f"{name}.weight": pairs, f"{name}.scale": (exponent + 127).to(torch.uint8).view(E8M0)}, true


def int4(name, weight):
    """compressed-tensors' "pack-quantized", Kimi-K2-Thinking's: groups of 32, symmetric, scales in bfloat16."""
    groups = weight.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    true = (codes.double() * scales.double()[..., None]).flatten(1)
    file = {
        f"{name}.weight_packed": words(codes.flatten(1) + 8),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    return file, true


def store(names, how, scale=0.05):
    """A state dict and the numbers, by name, of weights of these shapes: ``how(name, weight)`` stores each.

    ``how`` may be a mapping of parts of names to ways; the first that fits counts.
    """
    state, true = {}, {}
    for name, shape in names.items():
        way = how if callable(how) else next(way for part, way in how.items() if part in name)
        file, numbers = way(name, torch.randn(shape) * scale)
        state |= file
        true[name] = numbers
    return state, true


def expert_names(config, prefix="", projections=("gate_proj", "up_proj", "down_proj")):
    """Shapes of the weights of routed and shared experts; ``projections``: gate, up and down."""
    hidden, inner, names = config.hidden_size, config.intermediate_size, {}
    owners = {f"experts.{expert}": inner for expert in range(config.num_experts)}
    if config.num_shared:
        owners["shared_experts"] = config.shared_intermediate_size
    for owner, width in owners.items():
        shapes = (width, hidden), (width, hidden), (hidden, width)
        names |= {f"{prefix}{owner}.{projection}": shape for projection, shape in zip(projections, shapes)}
    return names


def stacked(true, config, prefix="", projections=("gate_proj", "up_proj", "down_proj")):
    """gate_up and down [experts, N, K] in float64: the routed experts, then the shared ones, cut to their size."""
    gate, up, down = projections
    gate_up, downs = [], []
    for expert in range(config.num_experts):
        weights = [true[f"{prefix}experts.{expert}.{projection}"] for projection in projections]
        gate_up.append(torch.cat(weights[:2]))
        downs.append(weights[2])
    for index in range(config.num_shared):
        part = slice(index * config.intermediate_size, (index + 1) * config.intermediate_size)
        shared = f"{prefix}shared_experts."
        gate_up.append(torch.cat([true[shared + gate][part], true[shared + up][part]]))
        downs.append(true[shared + down][:, part])
    return torch.stack(gate_up), torch.stack(downs)
