#!/usr/bin/env bash
# torch.onnx.export(dynamo=True) drops what a model writes into its arguments and buffers, without an error or a warning.
# The writes are in torch's own exported program: its signature names them (BUFFER_MUTATION, USER_INPUT_MUTATION), and
# the values are in the graph; only the ONNX model's outputs are the module's results alone. So a decoder that keeps its
# cache in a buffer or in an argument exports, loads and gives the right first answer, and forgets every token.
#
# Seen on 2026-11-29, CPU, torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, for a module that writes a row
# into its argument and counts its calls in a buffer:
#   written in torch: USER_INPUT_MUTATION cache, BUFFER_MUTATION calls; results of the ONNX model: 1; warnings: none
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/writes.py" <<'PY'
import sys
import warnings

import onnxruntime
import torch


class Cache(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, row, place, cache):
        cache.index_copy_(0, place, row)
        self.calls.add_(1)
        return cache.sum() + self.calls


given = torch.ones(1, 4), torch.tensor([2]), torch.zeros(3, 4)
program = torch.export.export(Cache().eval(), given).run_decompositions({})
kinds = [f"{spec.kind.name} {spec.target}" for spec in program.graph_signature.output_specs if spec.target]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = torch.onnx.export(Cache().eval(), given, dynamo=True, verbose=False)
of_writes = [str(one.message) for one in seen if "mutat" in str(one.message).lower()]
session = onnxruntime.InferenceSession(model.model_proto.SerializeToString())
results = len(session.get_outputs())
feed = dict(zip((value.name for value in session.get_inputs()), (part.numpy() for part in given)))
answer = session.run(None, feed)[0]
print(f"written in torch: {', '.join(sorted(kinds))}; results of the ONNX model: {results}; warnings: {of_writes or 'none'}")
sys.exit(not (len(kinds) == 2 and results == 1 and answer.item() == 5.0 and not of_writes))
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" numpy==2.2.6 onnx==1.23.2 \
    onnxscript==0.7.2 onnxruntime==1.32.0
"$folder/venv/bin/python" "$folder/writes.py"
