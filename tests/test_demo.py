"""The demo on a tiny model: what it prints, and when it fails."""

import sys

import pytest
import torch
import transformers

from mla_kernels import demo
from mla_kernels.compat import transformers_attention as compat
from mla_kernels.launch import KERNELS
from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.report import Report
from tests.compat.models import fast_cpu

SMOKE = ["--smoke", "--rounds", "1", "--tokens", "5"]


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


@pytest.fixture
def compiled(monkeypatch):
    """Compilations that were asked for; they succeed at once, except on the targets in ``compiled.broken``."""

    class Compiled(list):
        broken = ()

    asked = Compiled()

    def compile_many(requests, progress=None):
        asked.extend(requests)
        return [
            Report(r.chip.name, r.kernel.name, r.dtype, r.case, r.tile, r.chip.name not in asked.broken)
            for r in requests
        ]

    monkeypatch.setattr(demo, "compile_many", compile_many)
    monkeypatch.setattr(demo, "compiler_version", lambda kind: kind)
    return asked


def _wrong_decode(monkeypatch):
    right = compat.mla_decode

    def mla_decode(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return -out, lse

    monkeypatch.setattr(compat, "mla_decode", mla_decode)


def test_prints_texts_speeds_caches_and_matrix(capsys, compiled):
    assert demo.main(SMOKE) == 0
    printed = capsys.readouterr().out
    assert "Greedy text: identical (5 tokens" in printed
    assert "prefill, 64 tokens" in printed
    assert "decode, one token at a time" in printed
    heads, latent = 4 * (32 + 16 + 32) * 4, (64 + 16) * 4
    assert f"{heads:,}" in printed
    assert printed.count(f"{latent} ") >= 2, "transformers caches latents too"
    assert "Compile matrix" in printed
    assert {request.kernel.name for request in compiled} == set(demo.OF_THE_MODEL) <= set(KERNELS)
    targets = {name for name, chip in CHIPS.items() if chip.architecture == chip.generation}
    assert {request.chip.name for request in compiled} == targets and len(targets) == 10
    assert {request.dtype for request in compiled} == {"bf16"}
    assert len(compiled) == len(demo.OF_THE_MODEL) * len(targets), "one case a kernel"


def test_different_tokens_fail_in_fp32_only(capsys, monkeypatch):
    _wrong_decode(monkeypatch)
    assert demo.main([*SMOKE, "--no-matrix"]) == 1
    assert "Greedy text: different" in capsys.readouterr().out
    assert demo.main([*SMOKE, "--no-matrix", "--dtype", "bf16"]) == 0
    assert "Greedy text: different" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_fails(capsys, monkeypatch, compiled):
    compiled.broken = ("gfx950",)
    monkeypatch.setattr(demo, "compare_texts", lambda *arguments: True)
    assert demo.main(SMOKE) == 1
    assert "gfx950" in capsys.readouterr().out


def test_a_missing_toolchain_is_said_plainly(capsys, monkeypatch, compiled):
    def compiler_version(kind):
        if kind == "ascend":
            raise service.ToolchainMissing("no python with triton-ascend")
        return kind

    monkeypatch.setattr(demo, "compiler_version", compiler_version)
    monkeypatch.setattr(demo, "compare_texts", lambda *arguments: True)
    assert demo.main(SMOKE) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not compiled for ascend910b, ascend910c, ascend950: no python with triton-ascend" in printed
    assert {request.chip.is_gpu for request in compiled} == {True}


def test_an_emulated_npu_needs_the_ascend_compilers(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_KERNELS_ASCEND_PYTHON", str(tmp_path / "python"))
    assert demo.main([*SMOKE, "--backend", "npu-emulated"]) == 2
    assert "error: no Ascend toolchain at" in capsys.readouterr().err


def test_own_checkpoint_and_prompt(tmp_path, capsys, monkeypatch):
    model = demo.build_model(demo.SMOKE, torch.float32, seed=1)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: demo.ByteTokenizer())
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("A [bold] prompt.")
    arguments = ["--model", str(tmp_path / "model"), "--prompt", str(prompt), "--no-matrix", *SMOKE[1:]]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "DeepseekV2ForCausalLM from" in printed
    assert "17 tokens: A [bold] prompt." in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], "--tokens: got 0, at least 1 is accepted"),
        (["--prompt", "/no/such/file"], "--prompt: /no/such/file is no file"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--seed", str(2**64)], "--seed: got 18446744073709551616, an integer from"),
        (["--model", "no/such/folder"], "--model: no/such/folder is no folder with a config.json"),
        (["--prompt", "{bytes}"], "is no text in UTF-8"),
    ],
)
def test_bad_options_are_refused(arguments, words, capsys, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit) as stopped:
        demo.main([text.format(bytes=tmp_path / "bytes") for text in arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert demo.main(["--model", str(tmp_path), *SMOKE[1:]]) == 2
    assert f"error: --model: {tmp_path} cannot be loaded: Unrecognized model" in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused(tmp_path, capsys, monkeypatch):
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: demo.ByteTokenizer())
    assert demo.main(["--model", str(tmp_path), *SMOKE[1:]]) == 2
    assert f"error: --model: {tmp_path}: enable: got LlamaForCausalLM, accepted are" in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert demo.main([]) == 2
    assert "the demo needs rich and transformers: pip install" in capsys.readouterr().err


def test_a_version_that_is_not_supported_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.25.0")
    monkeypatch.delitem(sys.modules, "mla_kernels.compat.transformers", raising=False)
    assert demo.main(SMOKE) == 2
    assert "error: mla_kernels.compat.transformers takes transformers from 5.18 to 5.24, not 5.25.0" in (
        capsys.readouterr().err
    )


def test_weights_depend_on_the_seed():
    first, again, other = (demo.build_model(demo.SMOKE, torch.bfloat16, seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.dtype == torch.bfloat16


def test_bytes_as_tokens():
    tokenizer = demo.ByteTokenizer()
    assert tokenizer.encode("é") == [256, 0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode(demo.PROMPT)) == demo.PROMPT
