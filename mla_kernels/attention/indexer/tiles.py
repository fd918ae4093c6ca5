"""Which tile the kernels of the indexer take on which chip, and what a tile needs of its memories."""

from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY
from mla_kernels.quant.fp8 import AS_BYTES, AS_FNUZ, AS_HALVES, product_form

LOGITS_TILES = {
    "BLOCK_T": (8, 16, 32, 64),
    "BLOCK_H": (16, 32, 64),
    "BLOCK_N": (32, 64, 128, 256),
    "E4M3": (0, 1, 2, 3),
    "PEEL": (0, 1),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}


def from_registers(chip):
    """Whether products take both operands from registers (mma.sync)."""
    return chip.vendor == "nvidia" and not chip.dot_from_shared


def logits_form(chip, statics):
    """How a tile takes codes that lie in words, see :mod:`mla_kernels.quant.fp8`. Queries that are codes come as fp16
    where :func:`mla_kernels.attention.indexer.forward.as_multiplied` makes it of them."""
    if statics["CODES"]:
        return AS_BYTES.value if product_form(chip) == AS_HALVES.value else product_form(chip)
    if not chip.is_gpu or not statics["FP8"] or statics.get("FORMAT", "fp8") != "fp8":
        return AS_BYTES.value
    return AS_HALVES.value if chip.vendor == "nvidia" else AS_FNUZ.value


def logits_rule(chip, dtype, statics, sizes):
    """Keys enough to feed the matrix units from one load, all heads of a token, and as many tokens as come at once.

    With mma.sync a warp has 32 keys and few heads at a time: it alone sums over a key's heads, and the keys fit its
    registers.
    """
    heads = max(16, 1 << (statics["HEADS"] - 1).bit_length())
    tokens = max(8, min(32, 1 << (sizes["tokens"] - 1).bit_length()))
    tile = {"BLOCK_T": tokens, "BLOCK_H": min(heads, 64), "BLOCK_N": 128, "num_stages": 2}
    tile["E4M3"] = logits_form(chip, statics)
    if from_registers(chip) and dtype != "fp32":
        return tile | {"BLOCK_H": max(16, heads // 4), "PEEL": 1, "num_warps": 4}
    if dtype == "fp32":
        wide = from_registers(chip) and statics["HEAD_DIM"] <= 128  # a load of queries serves more keys
        tile |= {"BLOCK_N": 64 if wide else 32, "BLOCK_H": min(tile["BLOCK_H"], 32 if from_registers(chip) else 64)}
    page = statics["PAGE_SIZE"]
    while page and page % tile["BLOCK_N"] and tile["BLOCK_N"] > 32:
        tile["BLOCK_N"] //= 2
    if not chip.is_gpu and heads > 64:
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 64)  # sums of head tiles share UB with a tile
    wide = chip.vendor == "nvidia" and (tile["BLOCK_N"] >= 128 or dtype == "fp32")
    return tile | {"PEEL": 0, "num_warps": 8 if wide else 4}


def logits_memory(chip, dtype, statics, tile):
    """Upper bounds fitted to what the compilers report."""
    if tile["E4M3"] not in (AS_BYTES.value, logits_form(chip, statics)):
        return dict.fromkeys(chip.memory, NO_MEMORY)  # no such kernel
    size, width, stages = DTYPE_BYTES[dtype], statics["HEAD_DIM"], tile["num_stages"]
    k, q = tile["BLOCK_N"] * width * size, tile["BLOCK_H"] * width * size
    dots = tile["BLOCK_N"] * tile["BLOCK_H"] * 4
    several = statics["HEADS"] > tile["BLOCK_H"]
    if chip.vendor == "amd":
        together = k + q if statics["FP8"] and not statics["CODES"] else 0
        return {"shared": max(together, max(k, q) * max(1, stages - 1)) + 1024}
    if chip.is_gpu:
        q *= -(-statics["HEADS"] // tile["BLOCK_H"]) if dtype == "fp32" else 1
        buffers = stages if chip.dot_from_shared and dtype != "fp32" else max(1, stages - 1)
        return {"shared": k + q * buffers + 1024}
    more = dots * (several + 2 * (statics["PAGE_SIZE"] > 0))
    if statics["PAGE_SIZE"] % tile["BLOCK_N"]:  # rows are gathered through UB
        vectors = more + 4 * dots + 16 * tile["BLOCK_N"] * width
    else:
        vectors = more + 3 * dots + (3 * k if statics["FP8"] else 4096)
    return {"UB": vectors, "L1": 2 * (k + q), "L0C": dots * (2 if chip.memory["L0C"] > 128 << 10 else 1)}


RESIDENT_BLOCK = 8192  # most columns that a program of 8 warps, or on Ascend UB, keeps


def resident_block(chip) -> int:
    """Most columns that a program keeps: GPUs have 16 warps for twice as many."""
    return 2 * RESIDENT_BLOCK if chip.is_gpu else RESIDENT_BLOCK


def power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def topk_rule(chip, dtype, statics, sizes):
    """A chunk has 32 columns a thread on GPUs, and with the lanes that it needs a third of UB on Ascend."""
    block = min(resident_block(chip) if statics["RESIDENT"] else 2048, max(128, power_of_two(sizes["columns"])))
    wide = block > RESIDENT_BLOCK
    return {
        "BLOCK": block,
        "BLOCK_W": min(block, (2048 if wide else 1024) if chip.is_gpu else 512),
        "HISTOGRAM": int(chip.is_gpu and statics["RESIDENT"]),  # a scalar loop on Ascend
        "num_warps": 16 if wide else max(1, min(8, block // 512)),
    }


def topk_memory(chip, dtype, statics, tile):
    """Fitted to what the compilers report: the scans of BLOCK_W lanes, and on Ascend copies of BLOCK lanes."""
    if tile["HISTOGRAM"] and not statics["RESIDENT"]:
        return dict.fromkeys(chip.memory, NO_MEMORY)  # no such kernel
    block, written = tile["BLOCK"], tile["BLOCK_W"]
    if chip.is_gpu:
        return {"shared": 8 * written + 64 * tile["num_warps"]}
    return {"UB": (21 if statics["RESIDENT"] else 62) * block + 24 * written + 512}


def spread_rule(*names):
    """Chunks for about two programs a core on GPUs and one on Ascend, but none so short that a program reads more bytes
    of its row's counts (1 KiB a chunk) than of its values; the counts of 16 chunks at a time."""

    def rule(chip, dtype, statics, sizes):
        programs = (2 if chip.is_gpu else 1) * chip.vector_cores
        block = power_of_two(-(-sizes["rows"] * sizes["columns"] // programs))
        even = 1 << ((256 * sizes["columns"]).bit_length() - 1) // 2
        block = max(2048, even, block)
        block = min(RESIDENT_BLOCK if chip.is_gpu else 4096, block)
        blocks = {"BLOCK": block, "BLOCK_C": 16, "BLOCK_W": 1024 if chip.is_gpu else 512}
        return {name: blocks[name] for name in names} | {"num_warps": 8}

    return rule


def spread_memory(chip, dtype, statics, tile):
    """Fitted to what the compilers report: scans and histograms, and on Ascend copies of lanes and of counts."""
    written = tile.get("BLOCK_W", 0)
    if chip.is_gpu:
        return {"shared": max(8 * written, 1024 * tile["num_warps"]) + 64 * tile["num_warps"]}
    return {"UB": 32 * tile["BLOCK"] + 24 * written + 3072 * tile["BLOCK_C"]}
