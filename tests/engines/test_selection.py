"""vLLM's own plugin loader and selector, for capabilities that are pretended."""

import json
import subprocess
import sys

import pytest

OURS = "mla_kernels.compat.vllm_attention."
VLLM = "vllm.v1.attention.backends.mla."
LEFT_BEHIND = ("8.0", "8.6", "8.9", "11.0")
NATIVE = ("9.0", "10.3", "12.0", "12.1")


@pytest.fixture(scope="session")
def answers():
    found = {}

    def of(capability, *flags):
        if (capability, flags) not in found:
            command = [sys.executable, "-m", "tests.engines.choose", capability, *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            found[capability, flags] = json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout
        return found[capability, flags]

    return of


@pytest.mark.parametrize("capability", LEFT_BEHIND)
def test_without_the_plugin_there_is_no_backend(answers, capability):
    chosen, _ = answers(capability, "--without")
    assert chosen["sparse"].startswith("refused: No valid attention backend found")
    assert chosen["sparse by name"].startswith("refused")


@pytest.mark.parametrize("capability", LEFT_BEHIND)
def test_chips_without_kernels_get_ours(answers, capability):
    chosen, log = answers(capability)
    assert chosen["sparse"] == chosen["sparse fp8"] == OURS + "SparseInPlaceOfFlashMLA"
    assert chosen["dense"] == VLLM + "triton_mla.TritonMLABackend"
    assert chosen["deep_gemm"] == "mla_kernels.compat.deep_gemm"
    assert (chosen["fused_q"] == "mla_kernels.compat.vllm_dsa") == (capability in ("8.0", "8.6"))
    assert f"vLLM has no sparse latent attention for capability {capability}" in log
    assert chosen["v4"] == "V4Attention" and "DeepSeek-V4's layers" in log


@pytest.mark.parametrize("capability", ["8.0", "8.9"])
def test_other_models_are_left_alone(answers, capability):
    chosen, without = answers(capability)[0], answers(capability, "--without")[0]
    others = [name for name in chosen if "another model" in name]
    assert len(others) == 3 and "mla_kernels" not in json.dumps([chosen[name] for name in others])
    assert not chosen["products by deep_gemm"] and all(chosen[name] == without[name] for name in others)


def test_chips_without_bfloat16_get_nothing(answers):
    chosen, log = answers("7.5")
    assert all("refused" in chosen[name] for name in ("sparse", "sparse by name", "dense by name"))
    assert chosen["deep_gemm"] != "mla_kernels.compat.deep_gemm" and chosen["fused_q"] != "mla_kernels.compat.vllm_dsa"
    assert chosen["v4"] == "DeepseekV4FlashMLAAttention"
    assert "capability 7.5: the attention here needs 8.0" in log and "mla_kernels serves" not in log


@pytest.mark.parametrize("capability", NATIVE)
def test_chips_with_kernels_keep_theirs(answers, capability):
    chosen, log = answers(capability)
    without, _ = answers(capability, "--without")
    assert {n: c for n, c in chosen.items() if "name" not in n} == {
        n: c for n, c in without.items() if "name" not in n
    } | {n: chosen[n] for n in ("sinks", "head size", "fp16 over fp8")}
    assert chosen["sparse"].startswith(VLLM) and "mla_kernels serves" not in log
    assert chosen["v4"] in ("DeepseekV4FlashMLAAttention", "DeepseekV4FlashInferSM120Attention")


@pytest.mark.parametrize("capability", LEFT_BEHIND + NATIVE)
def test_by_name_everywhere(answers, capability):
    chosen, _ = answers(capability)
    assert chosen["sparse by name"] == chosen["sparse fp8 by name"] == OURS + "SparseBackend"
    assert chosen["dense by name"] == OURS + "DenseBackend"
    assert chosen["v4 by name"] == "V4Attention"
    assert chosen["v4 by the dense name"].startswith(
        "refused: --attention-backend: got MLA_KERNELS, MLA_KERNELS_SPARSE"
    )
    assert chosen["v4 by FlashMLA's"] == ("V4" if capability in LEFT_BEHIND else "DeepseekV4FlashMLA") + "Attention"


def test_what_is_not_supported_is_in_vllms_error(answers):
    chosen, _ = answers("8.0")
    assert "non-sparse not supported" in chosen["dense by the sparse name"]
    assert "attention sinks not supported" in chosen["sinks"]
    assert "head_size not supported" in chosen["head size"]
    assert "fp8_ds_mla is read as bfloat16, the model's dtype is torch.float16" in chosen["fp16 over fp8"]
