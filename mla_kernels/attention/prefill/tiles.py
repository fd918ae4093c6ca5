"""Which tile ``mla_prefill`` takes on which chip, and what a tile needs of its memories."""

from mla_kernels.launch import DTYPE_BYTES


def forward_rule(chip, dtype, statics, sizes):
    """The tile by what key and value take on chip; it looks at no size, so that nothing depends on the batch."""
    width = statics["WIDE"] + statics["REST"] + statics["ROPE"]
    large = max(width, statics["VALUE"]) > 192 or statics["VALUE"] > 128
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "PERSISTENT": int(not chip.is_gpu), "num_warps": 4, "num_stages": 2}
    if chip.vendor == "ascend":
        if dtype == "fp32" or large:
            tile |= {"BLOCK_M": 32 if dtype == "fp32" and large else 64, "BLOCK_N": 32}
    elif chip.vendor == "amd":
        tile |= {"BLOCK_M": 64 if large else 128, "BLOCK_N": 32, "num_stages": 1}
        if dtype == "fp32":
            tile |= {"BLOCK_M": 32, "BLOCK_N": 16}
    elif dtype == "fp32":
        tile |= {"BLOCK_M": 16, "BLOCK_N": 16}
    elif chip.dot_from_shared:
        tile |= {"BLOCK_M": 128, "BLOCK_N": 32 if large else 64, "num_warps": 8}
    else:
        tile |= {"BLOCK_N": 32, "num_warps": 8 if large else 4}
    return tile


def forward_memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, value, stages = DTYPE_BYTES[dtype], statics["VALUE"], tile["num_stages"]
    width = statics["WIDE"] + statics["REST"] + statics["ROPE"]
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    q, keys, p = block_m * width * size, block_n * (width + value) * size, block_m * block_n * size
    misfit = 1 << 30 if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        return {
            "UB": 5 * block_m * value * 2 + 3 * block_m * block_n * 4 + misfit,
            "L1": 2 * q + 4 * (keys + p),  # two loops, two buffers
            "L0C": block_m * (value + block_n) * 4,
        }
    if chip.vendor == "amd":
        part = max(block_m * statics["WIDE"], block_n * max(statics["WIDE"], value)) * size
        return {"shared": max(part, (stages - 1) * keys + p) + misfit}
    if not chip.dot_from_shared:
        return {"shared": max(q, stages * keys + 2 * p) + misfit}
    return {"shared": q + stages * keys + (1024 if chip.architecture == "100" else 0) + misfit}
