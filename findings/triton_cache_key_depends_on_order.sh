#!/usr/bin/env bash
# Triton's key for a compiled kernel in its cache on disk depends on which other kernel the process looked at before.
# Two kernels share a helper that uses a tl.constexpr of its module. Triton hashes a kernel's source with its helpers, and
# takes in the constants that they use; but it asks a helper for its constants before it has looked into it, so they are
# there only if another kernel came first. The kernel then has two keys: a cache that one process filled (an image with
# warm caches, a job that compiles beforehand) is not found by another that launches in another order, which compiles
# anew and says nothing.
#
# Seen on 2026-11-29, Triton 3.6.0 and 3.7.1 from the package index, no GPU, Python 3.12:
#   Triton 3.6.0: first kernel alone c942..., after the second one a2cd...
#   Triton 3.7.1: first kernel alone c942..., after the second one a2cd...
# Triton 3.9.0 hashes the helper first and gives one key.
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > kernels.py <<'PY'
import triton
import triton.language as tl

STEP = tl.constexpr(128)


@triton.jit
def whole_steps(length):
    return length // STEP * STEP


@triton.jit
def first(out, length):
    tl.store(out, whole_steps(length))


@triton.jit
def second(out, length):
    tl.store(out + 1, whole_steps(length))
PY
for version in 3.6.0 3.7.1; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version"
    alone=$("venv-$version/bin/python" -c "import kernels; print(kernels.first.cache_key)")
    behind=$("venv-$version/bin/python" -c "import kernels; kernels.second.cache_key; print(kernels.first.cache_key)")
    echo "Triton $version: first kernel alone ${alone:0:4}..., after the second one ${behind:0:4}..."
    [ "$alone" != "$behind" ]
done
