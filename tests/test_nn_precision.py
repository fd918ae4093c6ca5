"""Tensors that stay in float32: the router's and the indexer's, through casts, loading and any default dtype."""

import contextlib

import pytest
import torch

from mla_kernels import launch
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.nn import AttentionConfig, LatentAttention, MoE, MoEConfig, rope_tables

MOE = MoEConfig(64, 32, 32, 64, 4, num_groups=1, top_k_groups=1)
SPARSE = AttentionConfig(64, 4, 48, 32, 32, 16, 32, index_top_k=8, index_heads=16, index_head_dim=32)
KEPT = {
    "moe": ("gate.weight", "gate.e_score_correction_bias"),
    "softmax": ("gate.weight",),
    "hash": ("gate.weight",),
    "quantised": ("gate.weight", "gate.e_score_correction_bias"),
    "attention": ("indexer.weights_proj.weight", "indexer.k_norm.weight", "indexer.k_norm.bias"),
}
MAKE = {
    "moe": lambda: MoE(MOE),
    "softmax": lambda: MoE(MoEConfig(64, 32, 32, 8, 2, num_groups=1, top_k_groups=1, scoring="softmax")),
    "hash": lambda: MoE(
        MoEConfig(64, 32, 32, 8, 2, num_groups=1, top_k_groups=1, scoring="sqrt_softplus", hash_vocabulary=9)
    ),
    "quantised": lambda: MoE(MoEConfig(128, 128, 128, 8, 2, num_groups=1, top_k_groups=1), expert_format="fp8_block"),
    "attention": lambda: LatentAttention(SPARSE),
}
CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to a device, too": lambda m: m.to("cpu", torch.bfloat16),
    "to meta": lambda m: m.to("meta", torch.float16),
    "as another tensor": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type": lambda m: m.type(torch.bfloat16),
    "float and back": lambda m: m.float().bfloat16(),
    "double and back": lambda m: m.double().bfloat16(),
    "inside a model": lambda m: torch.nn.Sequential(torch.nn.ModuleDict({"layer": m})).bfloat16()[0]["layer"],
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensors_of(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_kept(module, name, narrow):
    """The kept tensors in float32, all other floating-point parameters in the narrow dtype."""
    for key, value in tensors_of(module).items():
        if key in KEPT[name]:
            assert value.dtype == torch.float32, key
        elif key in dict(module.named_parameters()):
            assert value.dtype == narrow, key
        elif key == "gate.tid2eid":
            assert value.dtype == torch.int64


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", MAKE)
def test_casts_before_and_after_loading(name, cast):
    source = MAKE[name]()
    state = {key: torch.rand_like(value) + 6 if value.is_floating_point() and key in KEPT[name] else value.clone()
             for key, value in source.state_dict().items()}  # fmt: skip
    narrow = torch.float16 if cast in ("half", "to meta") else torch.bfloat16
    for load_first in (False, True):
        module = MAKE[name]()
        if load_first:
            module.load_state_dict(state)
        module = CASTS[cast](module)
        assert_kept(module, name, narrow)
        if cast == "to meta":
            continue
        if not load_first:
            module.load_state_dict(state)
        for key in KEPT[name]:
            assert torch.equal(tensors_of(module)[key], state[key]), key


@pytest.mark.parametrize("name", MAKE)
def test_assigned_tensors_are_widened(name):
    """A file's bfloat16, which float32 holds; what it has in float32 is taken as it is."""
    state = {key: value.bfloat16() if value.is_floating_point() and "experts" not in key else value
             for key, value in MAKE[name]().state_dict().items()}  # fmt: skip
    with torch.device("meta"):
        module = MAKE[name]()
    module.load_state_dict(state, assign=True)
    for key in KEPT[name]:
        value = tensors_of(module)[key]
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())
    exact = {key: torch.rand(state[key].shape) for key in KEPT[name]}
    module.load_state_dict(state | exact, assign=True)
    assert all(torch.equal(tensors_of(module)[key], value) for key, value in exact.items())


@pytest.mark.parametrize("name", MAKE)
def test_any_default_dtype(name):
    for narrow in (torch.bfloat16, torch.float16):
        with default_dtype(narrow):
            module = MAKE[name]()
        assert_kept(module, name, narrow)


@pytest.mark.parametrize("name", MAKE)
def test_devices_and_wider_dtypes_are_followed(name):
    module = MAKE[name]()
    for dtype, cast in ((torch.float64, module.double), (torch.float32, module.float)):
        cast()
        assert all(value.dtype == dtype for value in module.parameters())
        assert all(tensors_of(module)[key].dtype == dtype for key in KEPT[name])
    values = {key: tensors_of(module)[key].clone() for key in KEPT[name]}
    assert all(value.is_meta for value in tensors_of(MAKE[name]().to("meta")).values())
    empty = MAKE[name]().to("meta").bfloat16().to_empty(device="cpu")
    assert_kept(empty, name, torch.bfloat16)
    module.to("cpu")
    assert all(torch.equal(tensors_of(module)[key], value) for key, value in values.items())


def test_routing_is_that_of_float32():
    """A bias with a large offset and a small spread has few values in bfloat16."""
    moe = MoE(MOE)
    moe.gate.e_score_correction_bias = 6.8 + 0.25 * torch.rand(64)
    hidden = torch.randn(256, 64).bfloat16()
    with torch.no_grad(), launch.on_cpu("torch"):
        weights, ids = moe.route(hidden)
        narrow_weights, narrow_ids = moe.bfloat16().route(hidden)
        scores = (hidden.double() @ moe.gate.weight.double().T).sigmoid() + moe.gate.e_score_correction_bias.double()
    assert torch.equal(ids, narrow_ids) and torch.equal(weights, narrow_weights)
    assert torch.equal(ids.long().sort(-1).values, scores.topk(4, -1).indices.sort(-1).values)


def test_the_indexers_weights_are_computed_in_float32():
    attention = LatentAttention(SPARSE).requires_grad_(False)
    state = {key: value.bfloat16() if "indexer" not in key else value for key, value in attention.state_dict().items()}
    attention.bfloat16().load_state_dict(state)
    indexer, hidden = attention.indexer, torch.randn(9, 64).bfloat16()
    q_latent, tables = torch.randn(9, 48).bfloat16(), (*rope_tables(16, 9, {"rope_theta": 1e4}), torch.arange(9))
    with launch.on_cpu("torch"):
        _, weights = indexer._query(hidden, q_latent, tables, hadamard=False)
    exact = hidden.double() @ indexer.weights_proj.weight.double().T * (16 * 32) ** -0.5
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact, atol=1e-6, rtol=1e-6)


def test_keys_of_a_bfloat16_layer_under_a_float32_norm(backend, device):
    attention = LatentAttention(SPARSE).requires_grad_(False).bfloat16().to(device)
    indexer = attention.indexer
    indexer.k_norm.weight.uniform_(0.5, 1.5)
    indexer.k_norm.bias.normal_()
    hidden = torch.randn(5, 64, device=device).bfloat16()
    positions = torch.arange(5, device=device)
    tables = [table.to(device) for table in rope_tables(16, 9, {"rope_theta": 1e4})]
    cache = IndexerCache.allocate(1, 8, head_dim=32, dtype=torch.bfloat16, device=device)
    indexer.write(hidden, *tables, positions, positions, cache)
    key = indexer.wk(hidden).double()
    centred = key - key.mean(-1, keepdim=True)
    key = centred / (centred.square().mean(-1, keepdim=True) + indexer.k_norm.eps).sqrt()
    key = key * indexer.k_norm.weight.double() + indexer.k_norm.bias.double()
    first, second = key[:, :8].clone(), key[:, 8:16].clone()
    cos, sin = (table[:5].double() for table in tables)
    key[:, :8], key[:, 8:16] = first * cos - second * sin, second * cos + first * sin
    got = cache.keys[0, :5].double()
    assert ((got - key).abs() <= 2.0**-8 * key.abs() + 1e-3).all()
