"""e4m3 (OCP "fn": 4 exponent bits of bias 7, 3 mantissa bits, no infinities, largest value 448) as bytes.

Chips without fp8 (sm_80, Ascend 910) and the Ascend compiler, which refuses the type, read and write it as integers; the
same code runs on every chip.
"""

from mla_kernels.language import tl, triton


@triton.jit
def decode_e4m3(codes):
    """Bytes (int8 or uint8) of any shape -> their values in fp16, exactly; the two NaN codes give +-480.

    The seven low bits are moved under fp16's exponent, which reads them 2^8 too small: its bias is 15, not 7.
    """
    bits = codes.to(tl.int16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0
