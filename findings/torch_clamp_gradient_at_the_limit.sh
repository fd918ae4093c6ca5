#!/usr/bin/env bash
# The gradient of torch.clamp for a value that lies exactly on the limit: 1 up to torch 2.13, and from 2.14 on 0 where the
# limit is a number, 0.5 where it is a tensor (as torch.minimum always had it). Values on the limit are common in 16 bits:
# SwiGLU's clamps are at 7 and 10, which bfloat16 holds exactly, and a whole interval of sums rounds to each. A fused
# backward that was held against torch's own therefore agrees with one version and not with the other.
#
# Seen on 2026-11-28, CPU, gradients of sum(clamp(x)) at x = 0.5, 1, 2 with the limit 1:
#   2.13.0: a number [1.0, 1.0, 0.0], a tensor [1.0, 1.0, 0.0]
#   2.14.1: a number [1.0, 0.0, 0.0], a tensor [1.0, 0.5, 0.0]
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/clamp.py" <<'PY'
import sys

import torch


def gradient(limit):
    x = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    x.clamp(max=limit).sum().backward()
    return x.grad.tolist()


found = gradient(1.0), gradient(torch.tensor(1.0))
print(f"torch {torch.__version__}: a number {found[0]}, a tensor {found[1]}")
on_the_limit = {"2.13.0": (1.0, 1.0), "2.14.1": (0.0, 0.5)}[sys.argv[1]]
sys.exit(tuple(one[1] for one in found) != on_the_limit)
PY
for version in 2.13.0 2.14.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" numpy==2.2.6
    "$folder/$version/bin/python" "$folder/clamp.py" "$version"
done
