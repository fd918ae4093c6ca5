"""Which tile ``mla_decode`` takes on which chip, and what a tile needs of its memories."""

from mla_kernels.launch import DTYPE_BYTES

_SCALE_BYTES = 16  # of a token: its scales, and zeros up to a multiple of this


def token_bytes(dtype, statics) -> int:
    """Bytes of a cached token."""
    latent, rope = statics["LATENT"], statics["ROPE"]
    if statics["LAYOUT"] == "plain":
        return (latent + rope) * DTYPE_BYTES[dtype]
    return latent + 2 * rope + (max(_SCALE_BYTES, latent // 32) if statics["LAYOUT"] == "fp8_v32" else _SCALE_BYTES)


def rule(chip, dtype, statics, sizes):
    """The widest row tile whose accumulator and keys stay on chip without spills; checked by compiling for every chip.

    It looks at the rows of one sequence only, never at the batch, so that a result does not depend on the batch.
    """
    rows = sizes["queries"] * sizes["heads"]
    page = statics["PAGE_SIZE"]
    small = dtype == "fp32" or rows <= 16
    tile = {"VALUE_TILES": 1, "PERSISTENT": int(not chip.is_gpu), "BRANCH": 0, "num_warps": 4, "num_stages": 2}
    if chip.vendor == "ascend":
        tile |= {"BLOCK_H": 16 if rows <= 16 else 32, "BLOCK_N": 32 if dtype == "fp32" else 64}
        while page % tile["BLOCK_N"] and tile["BLOCK_N"] > 32:
            tile["BLOCK_N"] //= 2
        if page % tile["BLOCK_N"]:  # rows are gathered through UB
            tile |= {"BLOCK_H": 16, "BLOCK_N": 16 if dtype == "fp32" else 32}
    elif chip.vendor == "amd":
        wide = dtype == "bf16" and chip.memory["shared"] > 65536 and page % 32 == 0 and not statics["CAUSAL"]
        wide = wide and rows > 32
        tile |= {"BLOCK_H": 16 if small else 64 if wide else 32, "BLOCK_N": 16 if dtype == "fp32" else 32}
        tile["num_stages"] = 1
    elif small:
        tile |= {"BLOCK_H": 16, "BLOCK_N": 16 if dtype == "fp32" else 32}
    else:
        hopper, newer = chip.architecture == "90", int(chip.architecture) >= 90
        wide = rows > 32 and chip.memory["shared"] >= 160 << 10 and (newer or not statics["CAUSAL"])
        tile |= {"BLOCK_H": 64 if wide else 32, "BLOCK_N": 32, "num_warps": 8}
        if wide and hopper and not statics["CAUSAL"]:
            tile["BLOCK_N"] = 64
    return tile


def memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, latent, rope = DTYPE_BYTES[dtype], statics["LATENT"], statics["ROPE"]
    block_h, block_n, value = tile["BLOCK_H"], tile["BLOCK_N"], latent // tile["VALUE_TILES"]
    q, k = block_h * (latent + rope) * size, block_n * (latent + rope) * size
    split_value = block_n * value * size if value < latent else 0
    p = block_h * block_n * size
    misfit = 1 << 30 if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        l0c = block_h * (value + block_n) * 4
        gathered = k if statics["PAGE_SIZE"] % block_n else 0
        return {
            "UB": 5 * block_h * value * 2 + block_h * block_n * 4 + 3 * gathered + misfit,
            "L1": 2 * (q + k + split_value + p + gathered),
            "L0C": l0c * (2 if chip.memory["L0C"] > 128 << 10 else 1),
        }
    stages = tile["num_stages"]
    if chip.vendor == "amd":
        keys = max(block_h, block_n) * latent * size + (stages - 1) * block_n * rope * size
        return {"shared": keys + split_value + misfit}
    architecture = int(chip.architecture)
    warp_groups = block_h >= 64 and tile["num_warps"] >= 4 and 90 <= architecture < 120 and dtype != "fp32"
    if stages == 1 or not warp_groups:
        keys = k + block_n * latent * size if stages == 1 else (stages - 1) * k
        return {"shared": q + keys + p + split_value + misfit}
    copy = block_n * latent * size + 2048 if architecture >= 100 else 0  # out of tensor memory and back
    return {"shared": q + stages * k + copy + split_value + misfit}
