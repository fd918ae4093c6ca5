#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) converts float32 to e4m3 and e5m2 wrongly where rounding carries into the
# exponent: the mantissa becomes 0 and the exponent stays, so that the result is half of the right value. 1.97 becomes 1,
# not 2, and 7.9 becomes 4: a sixteenth of the numbers between two powers of two in e4m3, an eighth in e5m2. In e4m3 ties go
# upwards, too, and not to even (100 becomes 104; torch gives 96).
# Whoever tests a kernel that quantises in the interpreter finds errors of 50%, or fits tolerances to them.
#
# Seen on 2026-11-29, Triton 3.6.0 (torch 2.11.0) and 3.9.0 (torch 2.15.0) from the package index, no GPU, Python 3.12 and
# 3.11; with both versions:
#   e4m3: 1.97 -> 1.0 (torch 2.0), 7.9 -> 4.0 (8.0), 0.49 -> 0.25 (0.5), 100.0 -> 104.0 (96.0); 6.2% of numbers are halved
#   e5m2: 1.97 -> 1.0 (torch 2.0), 7.9 -> 4.0 (8.0), 0.49 -> 0.25 (0.5), 100.0 -> 96.0 (96.0); 12.5% of numbers are halved
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/convert.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def convert(numbers, codes, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(codes + place, tl.load(numbers + place).to(codes.dtype.element_ty))


def in_triton(numbers, dtype):
    codes = torch.empty(numbers.shape, dtype=dtype)
    convert[(1,)](numbers, codes, COUNT=numbers.numel())
    return codes.float()


print(f"Triton {triton.__version__}, torch {torch.__version__}")
some = torch.tensor([1.97, 7.9, 0.49, 100.0])
many = 1 + torch.arange(1 << 16) / (1 << 16)  # [1, 2), evenly
expected = {"e4m3": (torch.float8_e4m3fn, 1 / 16, [1.0, 4.0, 0.25, 104.0]), "e5m2": (torch.float8_e5m2, 1 / 8, None)}
same = True
for name, (dtype, share, results) in expected.items():
    got, right = in_triton(some, dtype), some.to(dtype).float()
    halved = (in_triton(many, dtype) == many.to(dtype).float() / 2).float().mean().item()
    parts = ", ".join(f"{x:.4g} -> {y} ({z})" for x, y, z in zip(some.tolist(), got.tolist(), right.tolist()))
    print(f"{name}: {parts}; {halved:.1%} of numbers are halved")
    same &= abs(halved - share) < 0.01 and (results is None or got.tolist() == results)
sys.exit(not same)
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.15.0" "triton==3.9.0" numpy==2.2.6
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/convert.py"
