"""Which tile the kernel of sparse MLA takes on which chip, and what a tile needs of its memories."""

from mla_kernels.attention.decode import tiles as decode_tiles


def _as_decode(statics):
    """The constants of mla_decode_kernel where it gathers rows one by one, as this kernel does."""
    return statics | {"PAGE_SIZE": 1, "CAUSAL": False, "WINDOW": False}


def forward_rule(chip, dtype, statics, sizes):
    """mla_decode's tile for a gather. It depends on neither the batch nor the number of tokens, so no result does."""
    heads, layout = sizes["heads"], statics["LAYOUT"]
    if layout != "plain" and dtype != "bf16":
        raise NotImplementedError(f"sparse attention: {layout} caches are read as bf16, not as {dtype}")
    tile = decode_tiles.widest(chip, dtype, _as_decode(statics), {"queries": 1, "heads": heads})
    if layout == "fp8_v32" and chip.architecture == "90":  # gathers need registers for their addresses
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 32)
    if chip.architecture == "100" and tile["BLOCK_H"] == 32 and not statics["ROPE"]:
        tile["num_stages"] = 3  # with 2 a decode step spills in its loop
    return {name: size for name, size in tile.items() if name != "VALUE_TILES"}


def forward_memory(chip, dtype, statics, tile):
    return decode_tiles.memory(chip, dtype, _as_decode(statics), tile | {"VALUE_TILES": 1})
