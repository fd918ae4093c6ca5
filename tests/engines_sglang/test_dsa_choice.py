"""SGLang's own plugin loader and resolution of arguments, for capabilities that are pretended."""

import json
import subprocess
import sys

import pytest

from mla_kernels.compat import sglang_dsa

OURS = "mla_kernels"
KERNELS = {name for names in sglang_dsa.KERNELS.values() for name in names}
BF16, FP8 = "bfloat16", "fp8_e4m3"


@pytest.fixture(scope="module")
def answers():
    found = {}

    def of(capability, *flags):
        if (capability, flags) not in found:
            command = [sys.executable, "-m", "tests.engines_sglang.choose_dsa", capability, *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            found[capability, flags] = json.loads(done.stdout.splitlines()[-1]), done.stderr
        return found[capability, flags]

    return of


@pytest.mark.parametrize("capability", ["8.0", "8.9", "11.0"])
def test_chips_without_kernels_get_ours(answers, capability):
    chosen, log = answers(capability)
    default = FP8 if capability == "11.0" else BF16
    assert chosen[""] == chosen["by name"] == chosen["both"] == chosen["glm"] == ["dsa", OURS, OURS, default]
    assert chosen["fp8"] == chosen["fp8 by name"] == ["dsa", OURS, OURS, FP8]
    assert chosen["decode"] == ["dsa", OURS, OURS, default]
    assert set(chosen["replaced"]) >= KERNELS
    assert f"serves sparse latent attention on capability {capability}" in log


def test_without_the_plugin_kernels_are_chosen_that_there_are_none_of(answers):
    chosen, _ = answers("8.0", "--without")
    assert chosen[""] == ["dsa", "flashmla_sparse", "fa3", BF16]
    assert chosen["by name"].startswith("refused") and chosen["both"].startswith("refused")


def test_hopper_changes_only_where_it_is_asked(answers):
    chosen, log = answers("9.0")
    assert chosen[""] == chosen["glm"] == ["dsa", "flashmla_sparse", "fa3", BF16]
    assert chosen["fp8"] == ["dsa", "flashmla_kv", "flashmla_kv", FP8]
    assert chosen["by name"] == chosen["both"] == chosen["glm by name"] == ["dsa", OURS, OURS, BF16]
    assert chosen["fp8 by name"] == ["dsa", OURS, OURS, FP8]
    assert chosen["decode"] == ["dsa", "flashmla_sparse", OURS, BF16]
    assert not KERNELS & set(chosen["replaced"])
    assert log.count("serves sparse latent attention") == 3


def test_consumer_blackwell_keeps_flashinfer_for_glm(answers):
    chosen, _ = answers("12.0")
    assert chosen[""] == chosen["by name"] == ["dsa", OURS, OURS, FP8]
    assert chosen["glm"] == ["dsa", "flashinfer_sparse_mla", "flashinfer_sparse_mla", FP8]
    assert chosen["glm by name"] == ["dsa", OURS, OURS, FP8]
    assert not KERNELS & set(chosen["replaced"]) and "_validate_flashinfer_sparse_mla_backend" in chosen["replaced"]


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_implementations_that_the_user_named_are_kept(answers, capability):
    chosen, _ = answers(capability)
    assert chosen["theirs"] == ["dsa", "tilelang", "tilelang", BF16]
    assert "attention_backend: got 'mla_kernels' with" in chosen["contradiction"]
    assert chosen["v3"][0] == OURS  # dense attention, which has no implementations


def test_chips_without_bfloat16_get_nothing(answers):
    chosen, log = answers("7.5")
    assert chosen[""] == ["dsa", "flashmla_sparse", "fa3", BF16] and chosen["both"].startswith("refused")
    assert not KERNELS & set(chosen["replaced"]) and "serves sparse latent attention" not in log
    assert "capability 7.5: sparse attention here needs 8.0" in log
