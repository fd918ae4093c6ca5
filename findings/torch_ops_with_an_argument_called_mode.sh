#!/usr/bin/env bash
# An op that writes to an argument (mutates_args, or "Tensor(a!)" in a schema) and has another argument called "mode" runs
# eagerly, but torch.compile refuses it: "redirect_to_mode.<locals>.impl() got multiple values for argument 'mode'". To
# make it functional torch passes the op's arguments by keyword to a function of its own whose first parameter has that
# name. Under any other name the same op compiles; so does one called "mode" that writes nothing.
#
# Seen on 2026-11-29, CPU, torch 2.13.0 and 2.15.0 (which this installs), backend aot_eager:
#   kind, writes: compiles
#   mode, writes: TypeError: redirect_to_mode.<locals>.impl() got multiple values for argument 'mode'
#   mode, returns: compiles
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/mode.py" <<'PY'
import sys

import torch


@torch.library.custom_op("demo::kind_writes", mutates_args=("out",))
def kind_writes(x: torch.Tensor, out: torch.Tensor, kind: str) -> None:
    out.copy_(x * 2 if kind == "double" else x)


@torch.library.custom_op("demo::mode_writes", mutates_args=("out",))
def mode_writes(x: torch.Tensor, out: torch.Tensor, mode: str) -> None:
    out.copy_(x * 2 if mode == "double" else x)


@torch.library.custom_op("demo::mode_returns", mutates_args=())
def mode_returns(x: torch.Tensor, mode: str) -> torch.Tensor:
    return x * 2 if mode == "double" else x.clone()


mode_returns.register_fake(lambda x, mode: torch.empty_like(x))


def writing(op):
    def function(x):
        out = torch.empty_like(x)
        op(x, out, "double")
        return out

    return function


def outcome(function):
    torch._dynamo.reset()
    try:
        result = torch.compile(function, fullgraph=True, backend="aot_eager")(torch.ones(2))
    except Exception as error:
        return next(line for line in str(error).splitlines() if "Error" in line or "mode" in line)
    return "compiles" if result.tolist() == [2.0, 2.0] else f"gives {result.tolist()}"


for op in (kind_writes, mode_writes):
    assert writing(op)(torch.ones(2)).tolist() == [2.0, 2.0]  # eagerly both run
found = outcome(writing(kind_writes)), outcome(writing(mode_writes)), outcome(lambda x: mode_returns(x, "double"))
for name, one in zip(("kind, writes", "mode, writes", "mode, returns"), found):
    print(f"{name}: {one}")
sys.exit(not (found[0] == found[2] == "compiles" and "multiple values for argument 'mode'" in found[1]))
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/mode.py"
