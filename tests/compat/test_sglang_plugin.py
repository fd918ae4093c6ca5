"""What of SGLang's plugin needs no SGLang; tests/engines_sglang has the rest, inside SGLang's own package."""

import importlib.metadata
import sys
from types import SimpleNamespace

import pytest

from mla_kernels.compat import sglang_plugin

LISTS = ("ATTENTION_BACKEND_CHOICES", "CHUNKED", "DETERMINISTIC", "RADIX", "EXPERTS")
ADDERS = {
    "add_attention_backend_choices": ("ATTENTION_BACKEND_CHOICES", "extend"),
    "add_chunked_prefix_cache_attention_backend": ("CHUNKED", "append"),
    "add_deterministic_attention_backend_choices": ("DETERMINISTIC", "extend"),
    "add_radix_supported_deterministic_attention_backend_choices": ("RADIX", "extend"),
    "add_moe_runner_backend_choices": ("EXPERTS", "extend"),
}


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.5.23.post1", "0.6.0rc1"])
def test_other_versions_are_named_and_nothing_is_registered(monkeypatch, caplog, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"sglang": version}[name])
    monkeypatch.setitem(sys.modules, "sglang", None)  # importing it fails
    sglang_plugin.register()
    assert f"SGLang {version} is installed, the plugin was tried with 0.5.23 alone" in caplog.text


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23+cu130"])
def test_everything_is_registered_once(monkeypatch, version):
    choices = SimpleNamespace(**{name: ["triton"] for name in LISTS})
    for adder, (name, how) in ADDERS.items():
        setattr(choices, adder, getattr(getattr(choices, name), how))
    backends, runners, hooks = {}, [], []
    stages = SimpleNamespace(AROUND="around", AFTER="after")
    for name, content in {
        "sglang.srt.arg_groups.choices": choices,
        "sglang.srt.layers.attention.attention_registry": SimpleNamespace(
            register_attention_backend=lambda name: lambda made: backends.setdefault(name, made)
        ),
        "sglang.srt.utils": SimpleNamespace(is_cuda=lambda: False),
        "sglang.srt.layers.moe.utils": SimpleNamespace(register_moe_runner_backend_name=runners.append),
        "sglang.srt.plugins.hook_registry": SimpleNamespace(
            HookRegistry=SimpleNamespace(register=lambda *given: hooks.append(given[0])), HookType=stages
        ),
    }.items():
        monkeypatch.setitem(sys.modules, name, content)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"sglang": version}[name])
    sglang_plugin.register()
    sglang_plugin.register()
    assert all(getattr(choices, name) == ["triton", "mla_kernels"] for name in LISTS)
    assert list(backends) == runners == ["mla_kernels"] and len(hooks) == len(set(hooks)) == 4


def test_a_draft_may_take_ours(monkeypatch):
    made = SimpleNamespace(
        DraftBackend=lambda *given: ("steps", *given), DenseBackend=lambda *given: ("extension", *given)
    )
    monkeypatch.setattr(sglang_plugin, "_module", {"sglang_attention": made}.get)
    factory = SimpleNamespace(draft_model_runner="runner", topk=1, speculative_num_steps=3)

    def original(factory, name, backends, template, stamps_children):
        return backends["mla_kernels"](), backends["triton"]

    for stamps, want in ((True, ("steps", "runner", 1, 3)), (False, ("extension", "runner"))):
        chosen = sglang_plugin._draft(original, factory, "decode_attention_backend", {"triton": 7}, "", stamps)
        assert chosen == (("mla_kernels", want), 7)


def test_sglang_finds_the_plugin():
    (found,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="mla_kernels")
    assert found.load() is sglang_plugin.register
