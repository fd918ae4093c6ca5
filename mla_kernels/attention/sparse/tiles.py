"""Tiles of the kernels of sparse MLA and of its gradients by chip, and what a tile needs of its memories."""

from mla_kernels.attention.decode import tiles as decode_tiles
from mla_kernels.language import TRITON_VERSION
from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY


def _as_decode(statics):
    """The constants of mla_decode_kernel where it gathers rows one by one, as this kernel does."""
    return statics | {"PAGE_SIZE": 1, "CAUSAL": False, "WINDOW": False}


def forward_rule(chip, dtype, statics, sizes):
    """mla_decode's tile for a gather. It depends on neither the batch nor the number of tokens, so no result does."""
    heads, layout = sizes["heads"], statics["LAYOUT"]
    if layout != "plain" and dtype != "bf16":
        raise NotImplementedError(f"sparse attention: {layout} caches are read as bf16, not as {dtype}")
    tile = decode_tiles.widest(chip, dtype, _as_decode(statics), {"queries": 1, "heads": heads})
    if layout in ("fp8_v32", "fp8_v4") and chip.generation == "90":  # gathers need registers for their addresses
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 32)
    if chip.generation == "90" and tile["BLOCK_H"] >= 32 and not statics["ROPE"]:
        if TRITON_VERSION >= (3, 9):
            tile |= {"BLOCK_H": 32, "BLOCK_N": 64}  # 64 rows spill, and 32 with 32 picks do
        elif layout == "int8":
            tile["BLOCK_N"] = 32  # Triton 3.7 spills at 64
    small = chip.generation in ("89", "120") and layout == "plain" and tile["BLOCK_H"] == 16
    if small and statics["ROPE"] and dtype != "fp32":
        tile["BLOCK_N"] = 64  # one program a core of 99 KB in any case: twice the keys for a load of the queries
    if chip.generation == "100" and tile["BLOCK_H"] == 32 and not statics["ROPE"]:
        tile["num_stages"] = 3  # with 2 a decode step spills in its loop
    if layout == "fp8_v4" and chip.is_gpu and tile["BLOCK_H"] < 64:  # 32 picks spill, on NVIDIA 16 in one stage, too
        tile |= {"BLOCK_N": 16, "num_stages": 2 if chip.vendor == "nvidia" else 1}
    return {name: size for name, size in tile.items() if name != "VALUE_TILES"}


def pair_rule(chip, dtype, statics, sizes):
    """The tile of either cache alone, narrowed where two take more."""
    tile = forward_rule(chip, dtype, statics, sizes)
    if chip.vendor == "ascend" and statics["LAYOUT"] == "int8" and chip.memory["UB"] < 240 << 10:
        tile["BLOCK_N"] = 16  # 32 picks overflow UB by half a KB
    if chip.generation == "80" and statics["LAYOUT"] == "fp8_v4" and (3, 7) <= TRITON_VERSION < (3, 9):
        tile["num_stages"] = 1  # two spill with Triton 3.7
    wide = statics["WIDE"] or statics["EXTRA_WIDE"]
    one_product = statics["LAYOUT"] == "plain" and not statics["ROPE"]
    if chip.generation == "90" and one_product and (wide or tile["BLOCK_H"] == 32):
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 32)  # 64 spill
    if chip.generation == "120" and wide and dtype == "fp32":
        tile["num_stages"] = 1  # two spill
    if chip.generation == "100" and tile["BLOCK_H"] == 64 and not statics["ROPE"]:
        tile["BLOCK_H"] = 32  # 64 rows spill
    return tile


def forward_memory(chip, dtype, statics, tile):
    memory = decode_tiles.memory(chip, dtype, _as_decode(statics), tile | {"VALUE_TILES": 1})
    if chip.vendor == "nvidia":
        memory["shared"] += 4 * tile["BLOCK_N"]  # the picks
    return memory


def _gradient_rule(chip, dtype, statics, sizes):
    """Tiles whose accumulators and operands stay on chip without spills; checked by compiling for every chip."""
    heads = sizes["heads"]
    tile = {"BLOCK_H": 16, "BLOCK_N": 16, "VALUE_TILES": 1, "PERSISTENT": int(not chip.is_gpu)}
    tile |= {"num_warps": 4, "num_stages": 1}
    if chip.vendor == "ascend":
        narrow = dtype == "fp32" or chip.memory["L0C"] > 128 << 10
        tile |= {"BLOCK_H": 32, "BLOCK_N": 32, "VALUE_TILES": 2 if narrow else 1}
    elif chip.vendor == "nvidia" and dtype != "fp32":
        roomy = chip.memory["shared"] >= 160 << 10
        size = 32 if roomy and heads > 16 else 16
        tile |= {"BLOCK_H": size, "BLOCK_N": size, "num_warps": 8}
    return tile


def query_gradient_rule(chip, dtype, statics, sizes):
    """The tile that Triton's version keeps in registers."""
    tile, hopper, newest = (
        _gradient_rule(chip, dtype, statics, sizes),
        chip.generation == "90",
        TRITON_VERSION >= (3, 9),
    )
    halves = newest and chip.generation in ("90", "100", "120")
    if chip.vendor == "amd" and dtype == "fp32":
        tile |= {"VALUE_TILES": 4, "num_stages": 2}
    elif chip.vendor == "nvidia" and dtype == "fp32":
        tile |= {"BLOCK_H": 8, "VALUE_TILES": 2 if halves else 1}
        tile |= {"BLOCK_H": 4, "BLOCK_N": 32} if newest and chip.generation == "89" else {}
    elif chip.dot_from_shared and sizes["heads"] > 32:
        tile |= {"BLOCK_H": 32 if hopper and newest else 64, "BLOCK_N": 16 if hopper else 32}
    return tile


def pick_gradient_rule(chip, dtype, statics, sizes):
    tile = _gradient_rule(chip, dtype, statics, sizes) | {"STREAM": int(dtype == "fp32" and chip.is_gpu)}
    if tile["STREAM"]:
        tile |= {"VALUE_TILES": 4, "num_warps": 8 if chip.vendor == "nvidia" else 4}
    return tile


def gradient_memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, latent, width = DTYPE_BYTES[dtype], statics["LATENT"], statics["LATENT"] + statics["ROPE"]
    block_h, block_n, value = tile["BLOCK_H"], tile["BLOCK_N"], latent // tile["VALUE_TILES"]
    heads, rows, weights = block_h * (width + latent) * size, block_n * width * size, block_h * block_n * size
    misfit = NO_MEMORY if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        newer = chip.memory["L0C"] > 128 << 10
        buffers = 2 if newer else 1
        return {
            "UB": 2 * rows + block_h * value * (12 if newer else 4) + misfit,
            "L1": 2 * heads + rows,
            "L0C": buffers * max(block_h, block_n) * (value + statics["ROPE"]) * 4,
        }
    if tile.get("STREAM"):
        return {"shared": (3 if chip.vendor == "nvidia" else 1) * max(block_h, block_n) * value * size + misfit}
    if chip.vendor == "amd":
        pipelined = (tile["num_stages"] - 1) * (rows + (block_n * value * size if value < latent else 0))
        return {"shared": max(max(block_h, block_n) * latent * size, pipelined) + misfit}
    if "STREAM" in tile:
        return {"shared": tile["num_stages"] * heads + rows + 2 * weights + misfit}
    if tile["num_stages"] > 1 or block_h >= 64 or dtype == "fp32":
        return {"shared": heads + tile["num_stages"] * rows + misfit}
    return {"shared": heads + 2 * block_n * latent * size + misfit}
