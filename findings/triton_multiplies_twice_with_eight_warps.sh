#!/usr/bin/env bash
# Triton executes the first of two chained matrix products twice on Hopper when 64 rows are given to 8 warps. Flash
# attention's scores = q k^T, then weights v: the layout that tl.dot's result needs as operand of the next product is
# carried back through the softmax to the first product, the row statistics want it in its own layout, and the compiler
# makes both from a product each instead of converting one tile of scores. With 4 warps, a warp group for the 64 rows,
# there is one product. So 8 warps, which the accumulator of a wide value asks for, multiply queries and keys twice, and
# nothing says so but the generated code.
#
# Seen on 2026-11-28, Triton 3.6.0 and 3.9.0 from the package index, no GPU, Python 3.11; 64 queries and steps of 32 keys,
# 512 + 64 wide, so that 36 steps of 16 columns make the scores; wgmma instructions that a warp group executes for a step:
#   4 warps: 36 of 64x32x16 (scores), 4 of 64x256x16 (values)
#   8 warps: 72 of 64x16x16 (scores, where 36 would do), 2 of 64x256x16 (values)
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > attend.py <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def attend(q, keys, out, length, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr):
    row, key = tl.arange(0, 64), tl.arange(0, BLOCK)
    wide, narrow = tl.arange(0, LATENT), tl.arange(0, ROPE)
    q_wide = tl.load(q + row[:, None] * (LATENT + ROPE) + wide[None, :])
    q_narrow = tl.load(q + row[:, None] * (LATENT + ROPE) + LATENT + narrow[None, :])
    top = tl.full([64], -float("inf"), tl.float32)
    total = tl.zeros([64], tl.float32)
    acc = tl.zeros([64, LATENT], tl.float32)
    for first in range(0, length, BLOCK):
        start = keys + (first + key)[:, None].to(tl.int64) * (LATENT + ROPE)
        k_wide = tl.load(start + wide[None, :])
        k_narrow = tl.load(start + LATENT + narrow[None, :])
        scores = tl.dot(q_wide, k_wide.T, tl.dot(q_narrow, k_narrow.T))
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        old = tl.exp2(top - new)
        total = total * old + tl.sum(weights, 1)
        acc = tl.dot(weights.to(k_wide.dtype), k_wide, acc * old[:, None])
        top = new
    tl.store(out + row[:, None] * LATENT + wide[None, :], acc / total[:, None])


found = {}
for warps in (4, 8):
    source = ASTSource(
        attend,
        {"q": "*bf16", "keys": "*bf16", "out": "*fp32", "length": "i32"},
        constexprs={"LATENT": 512, "ROPE": 64, "BLOCK": 32},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})
    shapes = re.findall(r"wgmma\.mma_async\.\S*?\.(m64n\d+k16)", made.asm["ptx"])
    found[warps] = {shape: shapes.count(shape) for shape in sorted(set(shapes))}
    print(f"Triton {triton.__version__}, {warps} warps, wgmma instructions: {found[warps]}", flush=True)
assert found[4].get("m64n32k16") == 36 and found[8].get("m64n16k16") == 72, "one set of scores, or other shapes: changed"
PY
for version in 3.6.0 3.9.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version"
    TRITON_CACHE_DIR="$folder/cache-$version" "venv-$version/bin/python" attend.py
done
