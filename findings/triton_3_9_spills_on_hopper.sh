#!/usr/bin/env bash
# Triton 3.9.0 compiles sm_90 with another ptxas than 3.7.1 did: with the one called ptxas-blackwell (13.4), and not with
# ptxas (12.8), at --regAllocOptLevel=2. A kernel that keeps 64 x 512 float32 sums and fitted a Hopper warp's registers
# with room to spare spills then. Whoever chose the largest tile that does not spill has to choose again for this version.
#
# Seen on 2026-11-28, Triton 3.7.1 and 3.9.0 from the package index, no GPU, Python 3.11; the same source and options:
#   3.7.1, ptxas 12.8:             227 registers, 0 bytes of spill stores
#   3.9.0, ptxas-blackwell 13.4:   255 registers, 16 bytes (8 without the option)
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > attend.py <<'PY'
import re
import subprocess
import sys
from pathlib import Path

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
        inside = first + key < length
        start = keys + (first + key)[:, None].to(tl.int64) * (LATENT + ROPE)
        k_wide = tl.load(start + wide[None, :], mask=inside[:, None], other=0.0)
        k_narrow = tl.load(start + LATENT + narrow[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q_wide, k_wide.T, tl.dot(q_narrow, k_narrow.T))
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        old = tl.exp2(top - new)
        total = total * old + tl.sum(p, 1)
        acc = tl.dot(p.to(k_wide.dtype), k_wide, acc * old[:, None])
        top = new
    tl.store(out + row[:, None] * LATENT + wide[None, :], acc / total[:, None])


source = ASTSource(
    attend,
    {"q": "*bf16", "keys": "*bf16", "out": "*fp32", "length": "i32"},
    constexprs={"LATENT": 512, "ROPE": 64, "BLOCK": 64},
    attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 2})
Path("kernel.ptx").write_text(kernel.asm["ptx"])
from triton.backends.nvidia.compiler import get_ptxas  # the one that Triton itself takes for an architecture

command = [get_ptxas(90).path, "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
registers = int(re.search(r"Used (\d+) registers", said)[1])
spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
print(f"Triton {triton.__version__}, {Path(command[0]).name}: {registers} registers, {spilled} bytes of spill stores")
sys.exit((spilled > 0) != (sys.argv[1] == "spills"))
PY
for expected in "3.7.1 fits" "3.9.0 spills"; do
    set -- $expected
    python3 -m venv "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$1"
    TRITON_CACHE_DIR="$folder/cache-$1" "$1/bin/python" -W ignore attend.py "$2"
done
