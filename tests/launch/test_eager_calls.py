"""How many Python functions an eager call runs. They are most of what it costs the host; a count is the same on every
machine, a time is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.op_cases import OPS
from tests.launch.test_cuda_launch import stub_environment

MOST = {
    "write_kv": 22, "write_windows": 33, "write_paged_windows": 26, "compress_windows": 23,
    "write_latent": 20, "compress_latent": 21, "norm_and_write": 24, "mla_prolog": 29, "absorb_query": 19,
    "expand_output": 13, "gather_tokens": 11, "scatter_tokens": 15, "scatter_indexer_keys": 15, "copy_pages": 12,
    "mla_decode": 16, "mla_prefill": 23, "merge_states": 13, "sparse_mla_decode": 23, "sparse_mla_prefill": 21,
    "window_slots": 14, "entry_slots": 15,
    "write_indexer_key": 22, "quantise_indexer_query": 11, "rotate_indexer_query": 17, "rotate_heads": 17,
    "indexer_logits": 18, "paged_indexer_logits": 23, "indexer_topk": 19, "select_keys": 28, "select_slots": 36,
    "route": 12, "hash_route": 14, "balance_loss": 29, "expert_load": 11, "update_bias": 12,
    "dispatch": 15, "align_blocks": 20, "permute": 17, "unpermute": 20, "combine": 13, "expert_ffn": 26,
    "fused_moe": 38, "fused_experts": 34, "hyper_pre": 28, "hyper_post": 18, "hyper_post_pre": 33, "hyper_head": 27,
}  # fmt: skip
"""Op -> most Python functions of a call, on any of the supported versions. Lower one when the op needs fewer."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    command = [sys.executable, "-m", "tests.launch.eager_calls", *MOST]
    environment = stub_environment(tmp_path_factory.mktemp("stub"))
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("op", MOST)
def test_python_functions_of_a_call(op, counted):
    cases = {name: functions for name, functions in counted.items() if name.split()[0] == op}
    assert cases
    for name, functions in cases.items():
        assert len(functions) <= MOST[op], f"{name}: {len(functions)} calls, {MOST[op]} at most: {functions}"


def test_every_op_is_counted():
    assert OPS.keys() - MOST.keys() == {"convert_cache", "prefill_rows"}  # of two of the others, of torch's operators
