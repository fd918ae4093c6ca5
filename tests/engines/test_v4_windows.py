"""Finished windows of DeepSeek-V4 as this library and as vLLM's own Triton kernels write them, from the same states."""

from types import SimpleNamespace

import numpy
import pytest
import torch
import triton.runtime.interpreter as interpreter
from vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache import compress_norm_rope_store_triton

from mla_kernels.compat.engine_rope import rope_tables
from mla_kernels.compat.vllm_gather import indexer_cache
from mla_kernels.compat.vllm_rope import v4_cache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.windows.paged import write_paged_windows

EPS, ROPE, PADDING = 1e-6, 64, 3
KINDS = {"hca": (512, 128, 8), "csa": (512, 4, 4), "indexer": (128, 4, 4)}
"""Width, tokens of a window, and of a page of states."""


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    """Triton's interpreter loses a carry where it rounds to float8 (findings/triton_interpreter_halves_float8.sh)."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return convert(values, source, target, mode)
        codes = torch.from_numpy(numpy.array(values)).view(torch.float32).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def problem(kind):
    """Two requests, the first at its beginning; pages of no order that are parts of wider ones."""
    torch.manual_seed(0)
    width, ratio, size = KINDS[kind]
    row, columns = width * (1 + (ratio == 4)), 3 * ratio // size
    states = torch.full((2 * columns + 1, size + 1, 2 * row), float("nan"))[:, :size]
    states[: 2 * columns] = torch.randn(2 * columns, size, 2 * row)
    table = torch.randperm(2 * columns).view(2, columns).int()
    positions = torch.cat((torch.arange(2 * ratio), torch.arange(ratio + 1, 3 * ratio), torch.zeros(PADDING).long()))
    requests = torch.cat((torch.zeros(2 * ratio), torch.ones(2 * ratio - 1), torch.zeros(PADDING))).int()
    slots = torch.full_like(positions, -1)
    ends = (positions + 1) % ratio == 0
    slots[ends] = torch.randperm(8)[: int(ends.sum())]
    angles = torch.rand(3 * ratio, ROPE // 2) * 6
    both = torch.cat((angles.cos(), angles.sin()), 1)
    return states, positions, slots, requests, table, (torch.rand(width) + 0.5).bfloat16(), both


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_those_of_vllm(kind):
    width, ratio, size = KINDS[kind]
    states, positions, slots, requests, table, norm, both = problem(kind)
    token = 584 if width == 512 else 132
    theirs = torch.randint(256, (4, 2 * token), dtype=torch.uint8)  # pages of two entries
    ours = theirs.clone()
    compress_norm_rope_store_triton(
        state_cache=states, num_actual=len(slots), token_to_req_indices=requests, positions=positions,
        slot_mapping=slots, block_table=table, block_size=size, state_width=states.shape[2] // 2, cos_sin_cache=both,
        kv_cache=theirs.view(4, 2, token), k_cache_metadata=SimpleNamespace(slot_mapping=slots), pdl_kwargs={},
        head_dim=width, rope_head_dim=ROPE, compress_ratio=ratio, overlap=ratio == 4, use_fp4_cache=False,
        rms_norm_weight=norm, rms_norm_eps=EPS, quant_block=64 if width == 512 else 128,
        token_stride=576 if width == 512 else 128, scale_dim=8 if width == 512 else 4,
    )  # fmt: skip
    caches = [
        indexer_cache(data.view(4, 2, token), 128, data.device) if kind == "indexer" else v4_cache(data, 2)
        for data in (ours, theirs)
    ]
    write_paged_windows(
        states.unflatten(2, (2, -1)), positions, slots, requests, table, norm, *rope_tables(both), caches[0],
        ratio=ratio, overlap=ratio == 4, eps=EPS,
    )  # fmt: skip
    written = slots[slots >= 0]
    assert len(written) == 4
    (codes, scales, rotated), (want_codes, want_scales, want_rotated) = map(parts, caches)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rotated[written], want_rotated[written], rtol=2**-7, atol=1e-6)
    # vLLM rounds to bfloat16 first: a code may be the other one of the two that a value lies between
    apart = (codes.view(torch.int8).int() - want_codes.view(torch.int8).int()).abs()[written]
    assert apart.max() <= 1 and (apart == 0).float().mean() > 0.9
    others = torch.ones(8, dtype=torch.bool)
    others[written] = False
    assert torch.equal(codes[others], want_codes[others])
    assert torch.equal(rotated[others].view(torch.uint8), want_rotated[others].view(torch.uint8))


def parts(cache):
    """Codes, scales and rotated values [slots, ...] of a cache."""
    views = (cache.keys, cache.scales, cache.keys[..., :0]) if isinstance(cache, IndexerCache) else (
        cache.latents, cache.scales, cache.rope
    )  # fmt: skip
    return [view.flatten(0, 1) for view in views]
