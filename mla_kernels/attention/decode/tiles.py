"""Which tile ``mla_decode`` takes on which chip, and what a tile needs of its memories."""

from mla_kernels.language import TRITON_VERSION
from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY

_SCALE_BYTES = 16  # of a token: its scales, and zeros up to a multiple of this
_FP8 = ("fp8_v32", "fp8_v4")  # fp8_v4 is the sparse kernel's alone


def query_width(statics) -> int:
    """Values of a query of one head: in fp8_v4 the rotated ones are the latent's."""
    return statics["LATENT"] + (0 if statics["LAYOUT"] == "fp8_v4" else statics["ROPE"])


def token_bytes(dtype, statics) -> int:
    """Bytes of a cached token."""
    latent, rope = statics["LATENT"], statics["ROPE"]
    if statics["LAYOUT"] == "plain":
        return (latent + rope) * DTYPE_BYTES[dtype]
    if statics["LAYOUT"] == "fp8_v4":  # the rope values are the last of the latent
        return latent + rope + latent // 64
    return latent + 2 * rope + (max(_SCALE_BYTES, latent // 32) if statics["LAYOUT"] == "fp8_v32" else _SCALE_BYTES)


def rule(chip, dtype, statics, sizes):
    """:func:`widest` tile, narrowed on sm_90 where 64 rows and 64 paged keys are more than the registers hold.

    Triton 3.9 compiles by ptxas 13 and --regAllocOptLevel=2, at which 64 keys spill; Triton 3.6 spills where 64 are
    decoded from fp8, or of several pages.
    """
    tile, newest = widest(chip, dtype, statics, sizes), TRITON_VERSION >= (3, 9)
    if chip.generation != "90" or tile["BLOCK_H"] < 64 or statics["LATENT"] < 512:
        return tile
    if statics["ROPE"] == 0:
        return tile | ({"BLOCK_H": 32} if newest else {})
    crowded = statics["LAYOUT"] == "fp8_v32" or statics["PAGE_SIZE"] % 64
    if newest or (crowded and TRITON_VERSION < (3, 7)):
        tile["BLOCK_N"] = 32
    return tile


def widest(chip, dtype, statics, sizes):
    """The widest row tile whose accumulator and keys stay on chip without spills; checked by compiling for every chip.

    It looks at the rows of one sequence only, never at the batch, so that a result does not depend on the batch.
    """
    rows = sizes["queries"] * sizes["heads"]
    tile = {"VALUE_TILES": 1, "PERSISTENT": int(not chip.is_gpu), "BRANCH": 0, "num_warps": 4, "num_stages": 2}
    choose = {"ascend": _ascend, "amd": _amd, "nvidia": _nvidia}[chip.vendor]
    tile |= choose(chip, dtype, statics, rows)
    for name, needed in memory(chip, dtype, statics, tile).items():
        if needed > chip.memory[name]:
            raise NotImplementedError(
                f"mla_decode on {chip.name}: latent_dim {statics['LATENT']}, rope_dim {statics['ROPE']} in {dtype} and "
                f"layout {statics['LAYOUT']} with page_size {statics['PAGE_SIZE']} needs about {needed:,} bytes of "
                f"{name}, a program has {chip.memory[name]:,}"
            )
    return tile


def _ascend(chip, dtype, statics, rows):
    page, layout = statics["PAGE_SIZE"], statics["LAYOUT"]
    tile = {"BLOCK_H": 16 if rows <= 16 else 32, "BLOCK_N": 32 if dtype == "fp32" else 64}
    while page % tile["BLOCK_N"] and tile["BLOCK_N"] > 32:
        tile["BLOCK_N"] //= 2
    if page % tile["BLOCK_N"]:  # rows are gathered through UB
        tile |= {"BLOCK_H": 16, "BLOCK_N": 16 if dtype == "fp32" else 32}
    narrow = chip.memory["UB"] < 240 << 10
    if layout in _FP8:
        tile["BLOCK_N"] = 32
        if narrow:
            tile |= {"BLOCK_H": 16, "BLOCK_N": 16 if page % 32 else 32}
            if page % 16 and statics["LATENT"] >= 512:
                tile["VALUE_TILES"] = 4
    if layout == "int8" and narrow and statics["CAUSAL"]:
        tile |= {"BLOCK_H": 16, "BLOCK_N": 32}
    return tile


def _amd(chip, dtype, statics, rows):
    """Triton 3.6 spills at the widest tile, and where masks or scattered keys need registers beside 32 keys."""
    wide = dtype == "bf16" and chip.memory["shared"] > 65536 and statics["PAGE_SIZE"] % 32 == 0
    wide = wide and rows > 32 and not statics["CAUSAL"] and statics["LAYOUT"] == "plain" and TRITON_VERSION >= (3, 7)
    tile = {"BLOCK_H": 16 if dtype == "fp32" or rows <= 16 else 64 if wide else 32, "BLOCK_N": 32, "num_stages": 1}
    page = statics["PAGE_SIZE"]
    scattered = statics["CAUSAL"] and page % 32 and (statics["WINDOW"] or page % 16)
    crowded = TRITON_VERSION < (3, 7) and rows > 16 and (statics["CAUSAL"] or statics["WINDOW"] or page % 32)
    crowded = crowded or (rows > 16 and page % 32 and chip.memory["shared"] <= 65536)
    if dtype == "fp32" or (statics["LAYOUT"] == "int8" and rows > 16) or scattered or crowded:
        tile["BLOCK_N"] = 16
    return tile


def _nvidia(chip, dtype, statics, rows):
    layout = statics["LAYOUT"]
    hopper, newer = chip.generation == "90", int(chip.generation) >= 90
    roomy = chip.memory["shared"] >= 160 << 10
    if dtype == "fp32":  # masked scores leave no register on sm_80, whose compiler takes 255 for its pipeline of copies
        branch = int(chip.generation == "80" and statics["CAUSAL"] and statics["ROPE"] > 0)
        return {"BLOCK_H": 16, "BLOCK_N": 16, "BRANCH": branch}
    if hopper and rows > 32:  # without a rope part a branch has no cheap second product
        block_n = 32 if statics["CAUSAL"] and statics["WINDOW"] else 64
        return {"BLOCK_H": 64, "BLOCK_N": block_n, "BRANCH": int(statics["ROPE"] > 0), "num_warps": 8}
    # Without the branch chips with mma.sync compute scores twice, which is more than a third of the products; 32 rows
    # leave registers for it.
    branch = int(statics["ROPE"] > 0 and chip.generation in ("80", "89", "120"))
    if layout in _FP8 and rows > 16:
        tile = {"BLOCK_H": 32, "BLOCK_N": 32 if roomy else 16, "num_warps": 8, "num_stages": 1}
        return tile | {"BRANCH": branch if layout == "fp8_v32" else 0}
    if layout != "plain":
        narrow = layout in _FP8 and not roomy
        return {"BLOCK_H": 16 if rows <= 16 else 32, "BLOCK_N": 16 if narrow else 32, "num_warps": 8}
    if rows <= 16:
        return {"BLOCK_H": 16, "BLOCK_N": 32}
    masked = statics["CAUSAL"] and (statics["WINDOW"] or not newer)
    wide = rows > 32 and roomy and not masked
    return {"BLOCK_H": 64 if wide else 32, "BLOCK_N": 32, "BRANCH": 0 if wide else branch, "num_warps": 8}


def memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, latent, rope, layout = DTYPE_BYTES[dtype], statics["LATENT"], statics["ROPE"], statics["LAYOUT"]
    block_h, block_n, value = tile["BLOCK_H"], tile["BLOCK_N"], latent // tile["VALUE_TILES"]
    q, k = block_h * (latent + rope) * size, block_n * (latent + rope) * size
    split_value = block_n * value * size if value < latent else 0
    p = block_h * block_n * size
    misfit = NO_MEMORY if tile["PERSISTENT"] == chip.is_gpu or (tile["BRANCH"] and rope == 0) else 0
    if chip.vendor == "ascend":
        decoded = block_n * latent * size if layout != "plain" else 0
        l0c = block_h * (value + block_n * (2 if layout == "int8" else 1)) * 4
        gathered = block_n * token_bytes(dtype, statics) if statics["PAGE_SIZE"] % block_n else 0
        scaled = 5 * block_n * latent if layout in _FP8 else 0
        return {
            "UB": 5 * block_h * value * 2 + block_h * block_n * 4 + 3 * gathered + scaled + misfit,
            "L1": 2 * (q + k + split_value + p + gathered + decoded),
            "L0C": l0c * (2 if chip.memory["L0C"] > 128 << 10 else 1),
        }
    stages = tile["num_stages"]
    if chip.vendor == "amd":
        keys = max(block_h, block_n) * latent * size + (stages - 1) * block_n * rope * size
        return {"shared": keys + split_value + misfit}
    generation = int(chip.generation)
    warp_groups = block_h >= 64 and tile["num_warps"] >= 4 and 90 <= generation < 120 and dtype != "fp32"
    if layout != "plain":
        # the decoded tile (for fp8 one of each product's operands outside wgmma), what was read ahead, the rotated keys
        scales = block_n * 4 * (latent // 128 if layout == "fp8_v32" else 1)
        ahead = (stages - 1) * (block_n * latent + scales)
        copies = 1 if warp_groups or layout == "int8" else 2
        ropes = block_n * rope * size * (stages if warp_groups else 1)
        return {"shared": q + copies * block_n * latent * size + ahead + ropes + split_value + misfit}
    if stages == 1 or not warp_groups:
        keys = k + block_n * latent * size if stages == 1 else (stages - 1) * k
        return {"shared": q + keys + p + split_value + misfit}
    copy = block_n * latent * size + 2048 if generation >= 100 else 0  # out of tensor memory and back
    return {"shared": q + stages * k + copy + split_value + misfit}
