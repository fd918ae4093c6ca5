"""What attention over picked rows moves and computes, for the cost model: of one source, or of two together."""

from mla_kernels.attention.decode import tiles as decode_tiles
from mla_kernels.attention.splits import parts_of
from mla_kernels.launch import DTYPE_BYTES, Cost, Work


def programs_of(sizes, rows: int) -> int:
    """Programs of so many heads each that see all picks of a token."""
    return sizes["tokens"] * -(-sizes["heads"] // rows)


def attended_cost(dtype, statics, sizes, top_k, parts) -> Cost:
    """Of top_k picks a token. ``parts``: the most of a token that any chip works on apart, for the workspace."""
    tokens, heads = sizes["tokens"], sizes["heads"]
    latent, width, size = statics["LATENT"], decode_tiles.query_width(statics), DTYPE_BYTES[dtype]
    return Cost(
        flops=2.0 * tokens * heads * top_k * (width + latent),
        bytes=tokens * (heads * ((width + latent) * size + 4) + top_k * (decode_tiles.token_bytes(dtype, statics) + 4)),
        workspace=parts * tokens * heads * (latent + 1) * 4 if parts > 1 else 0,
    )


def attended_work(dtype, statics, sizes, tile, top_k, picks) -> Work:
    """Of programs that take ``picks`` of top_k each."""
    latent, width, size = statics["LATENT"], decode_tiles.query_width(statics), DTYPE_BYTES[dtype]
    apart = 2 * statics["ROPE"] if width == latent else 0  # columns of products that fp8_v4 has beside its codes'
    return Work(
        programs=programs_of(sizes, tile["BLOCK_H"]) * parts_of(top_k, picks),
        flops=2.0 * tile["BLOCK_H"] * picks * (width + latent + apart),
        bytes=tile["BLOCK_H"] * (width * size + latent * 4) + picks * (decode_tiles.token_bytes(dtype, statics) + 4),
    )
