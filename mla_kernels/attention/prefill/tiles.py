"""Which tile ``mla_prefill`` and its gradients take on which chip, and what a tile needs of its memories."""

from mla_kernels.language import TRITON_VERSION
from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY


def forward_rule(chip, dtype, statics, sizes):
    """The tile by what key and value take on chip; it looks at no size, so that nothing depends on the batch."""
    width = statics["FIRST"] + statics["REST"] + statics["ROPE"]
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
    width = statics["FIRST"] + statics["REST"] + statics["ROPE"]
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    q, keys, p = block_m * width * size, block_n * (width + value) * size, block_m * block_n * size
    misfit = NO_MEMORY if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        return {
            "UB": 5 * block_m * value * 2 + 3 * block_m * block_n * 4 + misfit,
            "L1": 2 * q + 4 * (keys + p),  # two loops, two buffers
            "L0C": block_m * (value + block_n) * 4,
        }
    if chip.vendor == "amd":
        part = max(block_m * statics["FIRST"], block_n * max(statics["FIRST"], value)) * size
        return {"shared": max(part, (stages - 1) * keys + p) + misfit}
    if not chip.dot_from_shared:
        return {"shared": max(q, stages * keys + 2 * p) + misfit}
    return {"shared": q + stages * keys + (1024 if chip.generation == "100" else 0) + misfit}


def key_gradient_rule(chip, dtype, statics, sizes):
    tile = _gradient_rule(chip, dtype, statics)
    if chip.generation == "90" and tile["BLOCK_N"] == 128:  # 32 queries spill where keys are wide or Triton is 3.9
        newest = TRITON_VERSION >= (3, 9)
        tile |= {"BLOCK_M": 16} if statics["REST"] or newest else {}
        tile |= {"num_stages": 3} if statics["REST"] and newest else {}
    return tile


def query_gradient_rule(chip, dtype, statics, sizes):
    """As for keys, with the roles of queries and keys exchanged."""
    tile = _gradient_rule(chip, dtype, statics)
    return tile | {"BLOCK_M": tile["BLOCK_N"], "BLOCK_N": tile["BLOCK_M"]}


def _gradient_rule(chip, dtype, statics):
    """Tiles whose accumulators and operands stay on chip without spills; checked by compiling for every chip."""
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "PERSISTENT": int(not chip.is_gpu), "num_warps": 4, "num_stages": 1}
    large = max(statics["FIRST"] + statics["REST"] + statics["ROPE"], statics["VALUE"]) > 192
    if chip.vendor == "nvidia":
        tile |= {"num_stages": 2}
        if dtype == "fp32":
            tile |= {"BLOCK_M": 16, "BLOCK_N": 16}
        elif large or chip.dot_from_shared:
            tile |= {"BLOCK_N": 32 if large else 128, "num_warps": 8}
    elif dtype != "fp32" and not large:
        tile |= {"BLOCK_N": 64}
    return tile


def key_gradient_memory(chip, dtype, statics, tile):
    gradient = statics["FIRST"] + statics["REST"] + statics["ROPE"] + statics["VALUE"]
    return _gradient_memory(chip, dtype, statics, tile, tile["BLOCK_N"], tile["BLOCK_M"], gradient)


def query_gradient_memory(chip, dtype, statics, tile):
    gradient = statics["FIRST"] + statics["REST"] + statics["ROPE"]
    return _gradient_memory(chip, dtype, statics, tile, tile["BLOCK_M"], tile["BLOCK_N"], gradient)


def _gradient_memory(chip, dtype, statics, tile, fixed, streamed, gradient):
    """Closed forms fitted to what the compilers report, for ``fixed`` rows with ``gradient`` columns to add up, and
    ``streamed`` rows; a tile of the other launch form counts as too large."""
    size, stages, widest = DTYPE_BYTES[dtype], tile["num_stages"], max(statics["FIRST"], statics["VALUE"])
    row = (statics["FIRST"] + statics["REST"] + statics["ROPE"] + statics["VALUE"]) * size
    pairs = fixed * streamed
    misfit = NO_MEMORY if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        return {
            "UB": 16 * pairs + misfit,
            "L1": (2 * fixed + 8 * streamed) * row + 6 * pairs * size,
            "L0C": (fixed * gradient + 2 * pairs) * 4,
        }
    if chip.vendor == "amd":
        return {"shared": max(fixed, streamed) * widest * size + (stages - 1) * streamed * row + misfit}
    if not chip.dot_from_shared:
        return {"shared": (fixed + max(stages - 1, 1) * streamed) * row + pairs * size + misfit}
    copies = stages + 1 if chip.generation == "100" else stages
    return {"shared": (fixed + copies * streamed) * row + pairs * size * (copies - stages) + misfit}
