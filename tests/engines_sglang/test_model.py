"""DeepSeek-V3 in SGLang's own model runner over this library's attention and experts, beside transformers'.

Rounding may choose another expert where two score alike: the judge takes those that SGLang's side chose, which are held
against its own apart.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.engines_sglang import tiny

BOTH = ("--attention-backend", "mla_kernels", "--moe-runner-backend", "mla_kernels")
ENGINES = {
    "pages of 1": (*BOTH, "--page-size", "1"),
    "pages of 64": (*BOTH, "--page-size", "64"),
    "prefixes without chunks": (*BOTH, "--page-size", "16", "--disable-chunked-prefix-cache"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def judge(folder):
    return tiny.judge(folder)


def run(folder, options):
    """What :func:`tests.engines_sglang.tiny.main` saves, of a process of its own; prefixes come in chunks."""
    out = folder / "out.pt"
    command = [sys.executable, "-m", "tests.engines_sglang.tiny", str(folder), str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"SGLANG_MAX_KV_CHUNK_CAPACITY": "192"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return torch.load(out)


def answer(judge, tokens, chosen):
    """(logits where each layer takes the experts ``chosen`` for its last tokens, the part that it chooses itself)."""
    layers = [layer.mlp for layer in judge.model.layers if hasattr(layer.mlp, "gate")]
    shared = []
    with pytest.MonkeyPatch.context() as patch:
        for layer, experts in zip(layers, chosen, strict=True):

            def route(hidden, gate=layer.gate.forward, experts=experts, config=judge.config):
                scores, weights, own = gate(hidden)
                cached = len(own) - len(experts)
                shared.append((own[cached:].sort(-1)[0] == experts.sort(-1)[0]).all(-1).float().mean())
                taken = torch.cat([own[:cached], experts])
                weights = scores.sigmoid().gather(1, taken)
                return scores, weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor, taken

            patch.setattr(layer.gate, "forward", route)
        with torch.no_grad():
            logits = judge(torch.tensor([tokens])).logits[0]
    return logits, torch.stack(shared).mean()


@pytest.mark.parametrize("name", ENGINES)
def test_logits_are_those_of_transformers(judge, folder, name):
    found = run(folder, ENGINES[name])
    assert found["experts"] == ["mla_kernels.compat.sglang_experts"]
    compare(judge, found, 0.04)


def test_experts_in_fp8(folder, tmp_path):
    """Ours without being asked for, below capability 8.9. Activations are rounded to fp8, too."""
    judge = tiny.judge(folder)
    tiny.quantise_experts(judge, folder, tmp_path)
    found = run(tmp_path, ("--attention-backend", "mla_kernels"))
    assert found["experts"] == ["mla_kernels.compat.sglang_experts"]
    compare(judge, found, 0.08)


def test_experts_of_other_methods_are_refused(judge, folder):
    """When the layer is built, before SGLang makes their weights."""
    with pytest.raises(RuntimeError, match="--moe-runner-backend: got mla_kernels for experts of W8A8Int8MoEMethod"):
        run(folder, (*ENGINES["pages of 64"], "--quantization", "w8a8_int8"))


def test_adapters_of_experts_are_refused(judge, folder):
    """SGLang computes such experts by its own Triton runner, whatever runner the layer has."""
    adapters = ("--enable-lora", "--max-lora-rank", "8", "--lora-backend", "torch_native", "--lora-target-modules")
    with pytest.raises(RuntimeError, match="--enable-lora: got adapters of experts that mla_kernels computes"):
        run(folder, (*ENGINES["pages of 64"], *adapters, "gate_up_proj", "down_proj"))


def compare(judge, found, error):
    assert found["backend"] == "DenseBackend"
    for prompt, cached, (logits, chosen) in zip(tiny.prompts(), tiny.CACHED, found["served"], strict=True):
        want, shared = answer(judge, prompt[: cached + len(logits)], chosen)
        worst = (logits - want[cached:]).abs().max() / want.abs().max()
        assert worst < error and shared > 0.95, (worst, shared)
