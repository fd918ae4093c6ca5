"""DeepSeek-V4's compressors against transformers': entries and carried state over prefill, chunks and single tokens."""

import pytest
import torch
from transformers import DeepseekV4Config, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

import mla_kernels as mk
from mla_kernels.reference import windows as reference
from tests.support import assert_close

HIDDEN, WIDTH, INDEX_WIDTH, ROPE, HCA, CSA = 48, 64, 32, 16, 8, 4
LAYERS = {"hca": "heavily_compressed_attention", "csa": "compressed_sparse_attention"}
CALLS = {
    "prefill": (27,),
    "chunks": (1, 9, 4, 13),
    "tokens": (1,) * 19,
    "then tokens": (13, 1, 1, 1, 1, 1, 1, 2, 3),
}


def compressor(kind, dtype=torch.float32):
    """(module, its cache, what it calls its states): the compressor of a layer, or its indexer's."""
    layer = LAYERS["hca" if kind == "hca" else "csa"]
    config = DeepseekV4Config(
        hidden_size=HIDDEN, head_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=24,
        layer_types=[layer], compress_rates={LAYERS["csa"]: CSA, LAYERS["hca"]: HCA}, index_head_dim=INDEX_WIDTH,
        index_n_heads=2, index_topk=3, partial_rotary_factor=None, sliding_window=8, max_position_embeddings=512,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": ROPE / WIDTH},
            "compress": {"rope_type": "default", "rope_theta": 1.6e5, "partial_rotary_factor": ROPE / WIDTH},
        },
    )  # fmt: skip
    module = hf.DeepseekV4HCACompressor(config) if kind == "hca" else hf.DeepseekV4CSACompressor(config)
    for name, weight in module.named_parameters():
        noise = torch.randn_like(weight)
        weight.data = 1 + 0.2 * noise if "norm" in name else noise if "bias" in name else noise * HIDDEN**-0.5
        if not ("norm" in name or "bias" in name):
            weight.data = weight.data.to(dtype)
    return module, DynamicCache(config=config)


def run(module, cache, hidden, start):
    positions = torch.arange(start, start + hidden.shape[1]).expand(hidden.shape[0], -1)
    return module(hidden, torch.randn(*hidden.shape[:2], 24).to(hidden.dtype), positions, cache, 0)


def part(module, kind):
    """(the module with the weights, name of its states, overlap, ratio, entry width)."""
    if kind == "indexer":
        return module.indexer, "indexer", True, CSA, INDEX_WIDTH
    return module, "compressor", kind == "csa", HCA if kind == "hca" else CSA, WIDTH


def tables(own, length=64):
    cos, sin = own.rotary_emb(torch.zeros(1), position_ids=torch.arange(length)[None], layer_type="compress")
    return cos[0].contiguous(), sin[0].contiguous()


def arguments(own, hidden):
    """kv, gate, position bias, norm weight, cos, sin of tokens [T, HIDDEN]."""
    return own.kv_proj(hidden), own.gate_proj(hidden), own.position_bias, own.kv_norm.weight, *tables(own)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hca", "csa", "indexer"])
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("by", ["reference", "op"])
def test_entries_and_state(kind, calls, by, cpu_code):
    """Two sequences of one length, as a batch there and packed here, call by call. The newest rows of the ring are what
    transformers keeps in its buffer, and (with overlap) of the last window."""
    module, cache = compressor(kind)
    own, name, overlap, ratio, width = part(module, kind)
    total, rows = sum(CALLS[calls]), ratio * (1 + overlap) + 3
    hidden = torch.randn(2, total, HIDDEN)
    slots, table = torch.tensor([2, 0], dtype=torch.int32), torch.randperm(8).int().view(2, 4)
    state = torch.full((3, rows, 2, own.position_bias.shape[1]), float("nan"))
    data = torch.zeros(8, 4, width)
    done = 0
    for count in CALLS[calls]:
        new = hidden[:, done : done + count]
        run(module, cache, new, done)
        done += count
        values = arguments(own, new.flatten(0, 1))
        places = slots, torch.tensor([0, count, 2 * count]).int(), torch.full((2,), done).int(), table
        options = {"ratio": ratio, "overlap": overlap, "eps": own.kv_norm.variance_epsilon}
        if by == "reference":
            layout = "indexer" if kind == "indexer" else None
            reference.write_windows(*values, state, *places, data, layout=layout, max_tokens=count, **options)
        else:
            pages = mk.IndexerCache(data, width) if kind == "indexer" else mk.LatentCache(data, width)
            mk.write_windows(*values, state, *places, pages, max_tokens=count, **options)
        layer = cache.layers[0]
        found = data[table.long()].flatten(1, 2)[:, : done // ratio]
        assert layer.entry_count[name] == done // ratio
        torch.testing.assert_close(found, layer.compressed_kv[name], rtol=1e-5, atol=1e-5)
        pending = [position % rows for position in range(done // ratio * ratio, done)]
        held = state[slots.long()][:, pending]
        torch.testing.assert_close(held[:, :, 0], layer.buffer_kv[name])
        torch.testing.assert_close(held[:, :, 1], layer.buffer_gate[name])
        if overlap and done >= ratio:
            window = [position % rows for position in range((done // ratio - 1) * ratio, done // ratio * ratio)]
            held = state[slots.long()][:, window, :, :width]
            torch.testing.assert_close(held[:, :, 0], layer.overlap_kv[name])
            biased = held[:, :, 1] + own.position_bias[:, :width]
            torch.testing.assert_close(biased, layer.overlap_gate[name])


@pytest.mark.parametrize("kind", ["hca", "csa"])
@pytest.mark.parametrize("by", ["reference", "op"])
def test_gradients(kind, by, cpu_code):
    """Of hidden states and all weights of a layer in training, without a cache, within 1e-5 of autograd's."""
    module, _ = compressor(kind)
    own, _, overlap, ratio, _ = part(module, kind)
    hidden = torch.randn(2, 27, HIDDEN, requires_grad=True)
    weights = [own.kv_proj.weight, own.gate_proj.weight, own.position_bias, own.kv_norm.weight]
    theirs = run(module, None, hidden, 0)[0][:, 0]
    weighting = torch.randn_like(theirs)
    want = torch.autograd.grad((theirs * weighting).sum(), [hidden, *weights])
    compress = reference.compress_windows if by == "reference" else mk.compress_windows
    ours, ends = compress(
        *arguments(own, hidden.flatten(0, 1)), torch.tensor([0, 27, 54]).int(), ratio=ratio, overlap=overlap,
        eps=own.kv_norm.variance_epsilon,
    )  # fmt: skip
    assert ends.tolist() == [0, 27 // ratio, 2 * (27 // ratio)]
    rows = 2 * (27 // ratio)
    assert_close(ours[:rows], theirs.double().flatten(0, 1))
    assert not ours[rows:].any()
    got = torch.autograd.grad((ours[:rows] * weighting.flatten(0, 1)).sum(), [hidden, *weights])
    for one, other in zip(got, want):
        assert_close(one, other.double())


@torch.no_grad()
def test_rounded_weights():
    """In bfloat16 transformers rounds the softmax's weights and their sum; the reference offers both."""
    module, _ = compressor("hca", torch.bfloat16)
    own, _, overlap, ratio, _ = part(module, "hca")
    hidden = torch.randn(1, 24, HIDDEN).bfloat16()
    theirs = run(module, None, hidden, 0)[0][0, 0]
    values = arguments(own, hidden[0])
    kv, gate, bias, norm, cos, sin = values
    windows = [reference.window_slots(kv, gate, bias, w, ratio=ratio, overlap=overlap) for w in range(24 // ratio)]
    found = [
        torch.stack(
            [
                reference.window_entry(*slots, norm, cos[w * ratio], sin[w * ratio], eps=1e-6, cast_weights=cast)
                for w, slots in enumerate(windows)
            ]
        )
        for cast in (True, False)
    ]
    off = [(one.float() - theirs.float()).abs().max().item() for one in found]
    assert off[0] <= off[1] and off[0] < 0.05


@torch.no_grad()
def test_raw_tokens():
    """write_kv is the attention's kv_norm and rotation, and its q_a_norm."""
    norm = hf.DeepseekV4RMSNorm(WIDTH)
    norm.weight.data = 1 + 0.2 * torch.randn(WIDTH)
    kv, positions = torch.randn(7, WIDTH), torch.randint(0, 30, (7,))
    angles = torch.rand(30, ROPE // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    want = hf.apply_rotary_pos_emb(norm(kv)[None, None], cos[positions][None], sin[positions][None])[0, 0]
    data = torch.zeros(2, 4, WIDTH)
    latent = reference.write_kv(
        kv, norm.weight, cos, sin, positions, torch.arange(7), data, q_a=kv.flip(0), q_norm=norm.weight
    )
    torch.testing.assert_close(data.flatten(0, 1)[:7], want)
    torch.testing.assert_close(latent, norm(kv.flip(0)))  # as q_a_norm
