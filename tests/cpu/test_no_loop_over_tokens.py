"""No CPU op runs torch operators token by token: their number stays the same from a few tokens to many."""

import pytest
import torch

from mla_kernels.cpu import attention, hyper, latent, moe, route, windows
from tests.cpu.recorder import record


def write_args(tokens, dtype=torch.bfloat16):
    tables = (torch.rand(32).to(dtype), torch.rand(tokens, 8), torch.rand(tokens, 8))
    cache = torch.zeros(tokens // 4 + 1, 4, 48, dtype=dtype)
    return (*tables, torch.arange(tokens), torch.randperm(tokens), cache, "latent_16bit", 32, "interleaved", 1e-6)


def experts(tokens):
    ids = (torch.arange(tokens * 2, dtype=torch.int32) % 4).view(tokens, 2)
    return torch.randn(tokens, 32), torch.randn(4, 48, 32), torch.randn(4, 32, 24), torch.rand(tokens, 2), ids


def decode_args(tokens):
    pages = torch.randperm(-(-tokens // 4)).int()[None]
    q, cache = torch.randn(1, 3, 2, 48), torch.randn(pages.numel(), 4, 48)
    return q, cache, pages, torch.tensor([tokens], dtype=torch.int32), None, 0.1, True, 1 << 30, "latent_32bit", 32


def windows_args(tokens):
    kv, gate = torch.randn(2, tokens, 64)
    tables = torch.rand(tokens, 8), torch.rand(tokens, 8)
    return kv, gate, torch.randn(4, 64), torch.rand(32), *tables


def write_windows_args(tokens):
    """A prompt whose first tokens lie in the state."""
    length = tokens + 6
    places = torch.tensor([0, tokens]), torch.tensor([length]), torch.arange(length // 16 + 1)[None]
    *rows, cos, sin = windows_args(tokens)
    tables = cos.repeat(4, 1), sin.repeat(4, 1)
    cache = torch.zeros(length // 16 + 1, 4, 32)
    options = cache, "latent_32bit", 4, True, tokens, 1e-6
    return *rows, *tables, torch.randn(1, 9, 2, 64), torch.tensor([0]), *places, *options


def write_paged_windows_args(tokens):
    """A prompt over pages of 4 states."""
    places = torch.arange(tokens), torch.where(torch.arange(tokens) % 4 == 3, torch.arange(tokens) // 4, -1)
    table = torch.randperm(tokens // 4).int()[None]
    weights = torch.rand(32), torch.rand(tokens, 8), torch.rand(tokens, 8)
    cache = torch.zeros(tokens // 16 + 1, 4, 32)
    states = torch.randn(tokens // 4, 4, 2, 64)
    return states, *places, torch.zeros(tokens).int(), table, *weights, cache, "latent_32bit", 4, True, 1e-6


def compress_args(tokens):
    return *windows_args(tokens), torch.tensor([0, tokens // 2, tokens], dtype=torch.int32), 4, True, 1e-6


def hyper_args(tokens):
    streams, out = torch.randn(tokens, 4, 32), torch.randn(tokens, 32)
    weights = torch.randn(24, 128), torch.randn(24), torch.rand(3), torch.rand(32)
    return streams, out, torch.rand(tokens, 4), torch.rand(tokens, 4, 4), *weights, "sinkhorn", 20, 1e-6, 1e-6, 2.0


CASES = {
    "write_kv": (
        windows.write_kv,
        lambda tokens: (
            torch.randn(tokens, 32),
            torch.rand(32),
            torch.rand(tokens, 8),
            torch.rand(tokens, 8),
            torch.arange(tokens),
            torch.randperm(tokens),
            torch.zeros(tokens // 4 + 1, 4, 32),
            "latent_32bit",
            1e-6,
        ),
    ),
    "write_kv_with_latent": (
        windows.write_kv_with_latent,
        lambda tokens: (torch.randn(tokens, 24), torch.rand(24), *CASES["write_kv"][1](tokens)),
    ),
    "write_windows": (windows.write_windows, write_windows_args),
    "write_paged_windows": (windows.write_paged_windows, write_paged_windows_args),
    "compress_windows": (windows.compress_windows, compress_args),
    "compress_windows_backward": (
        windows.compress_windows_backward,
        lambda tokens: (torch.randn(tokens // 4, 32), *compress_args(tokens)),
    ),
    "compress_latent": (
        latent.compress_latent,
        lambda tokens: (torch.randn(tokens, 40).bfloat16(), torch.randn(48, 40).bfloat16(), *write_args(tokens)),
    ),
    "write_latent": (latent.write_latent, lambda tokens: (torch.randn(tokens, 48).bfloat16(), *write_args(tokens))),
    "mla_decode": (attention.mla_decode, decode_args),
    "merge_states": (attention.merge_states, lambda tokens: (torch.randn(3, tokens, 8), torch.randn(3, tokens))),
    "route": (
        route.route,
        lambda tokens: (torch.randn(tokens, 16), torch.randn(16), 4, "sigmoid", 4, 2, None, None, True, 1.0, 1),
    ),
    "dispatch": (moe.dispatch, lambda tokens: (experts(tokens)[4], 4)),
    "fused_moe": (moe.fused_moe, experts),
    "hyper_post_pre": (hyper.hyper_post_pre, hyper_args),
    "hyper_pre_backward": (
        hyper.hyper_pre_backward,
        lambda tokens: (
            torch.rand(tokens, 32),
            *hyper_args(tokens)[2:4],
            hyper_args(tokens)[0],
            *hyper_args(tokens)[4:],
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_do_not_grow_with_tokens(name):
    function, arguments = CASES[name]
    function(*arguments(2))  # what is tried out once, in the first call
    few, many = (record(function, *arguments(tokens)).operators for tokens in (40, 400))
    assert few == many
