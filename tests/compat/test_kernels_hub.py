"""The package as a kernel repository of Hugging Face's kernels: written, loaded offline, its layers in models."""

import importlib.metadata
import json
import logging
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernels
import pytest
import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.laguna.modeling_laguna import LagunaTopKRouter
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter
from transformers.utils.import_utils import is_kernels_available

import mla_kernels
from mla_kernels import kernels_repo
from mla_kernels.__main__ import main
from mla_kernels.agreement.compare import distance
from mla_kernels.compat import kernels_attention, kernels_hub, kernels_layers
from tests.children import child_environment

pytestmark = pytest.mark.usefixtures("cpu_code", "offline")

SIZES = dict(hidden_size=32, num_experts_per_tok=2, moe_router_logit_softcapping=5.0)


@pytest.fixture
def offline(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return kernels_repo.write(tmp_path_factory.mktemp("hub") / "repository")


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    return module.eval()


def gpt_oss():
    config = transformers.GptOssConfig(num_local_experts=5, intermediate_size=16, hidden_size=32, num_experts_per_tok=2)
    return filled(GptOssMLP(config))


def router(cls):
    return filled(cls(SimpleNamespace(**SIZES, num_experts=7)))


MODULES = {"gpt_oss": gpt_oss, "qwen": lambda: router(Qwen3_5MoeTopKRouter), "laguna": lambda: router(LagunaTopKRouter)}


# ---------------------------------------------------------------------------------------------------------------------
# The repository


def test_it_is_loaded_by_the_library(repository):
    kernel = kernels.get_local_kernel(repository)
    assert {name for name in vars(kernel.layers) if not name.startswith("_")} == set(kernels_hub.LAYERS)
    (loaded,) = [one for one in kernels.get_loaded_kernels() if one.module is kernel]
    assert str(loaded.metadata.name) == "mla-kernels" and loaded.metadata.version == 1
    assert kernel.layers.MegaBlocksMoeMLP is kernels_layers.MegaBlocksMoeMLP
    assert kernel.flash_attn_varlen_func is kernels_attention.flash_attn_varlen_func


def test_it_carries_the_package(repository, tmp_path):
    """Where none is installed, the copy runs."""
    program = f"""
import sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if not Path(path, "mla_kernels").exists()]
import kernels
kernels.get_local_kernel(Path({str(repository)!r}))
import mla_kernels, mla_kernels.reference, mla_kernels.autotune.store, mla_kernels.device, torch
print(mla_kernels.__file__, mla_kernels.route(torch.randn(3, 8), 2)[1].shape)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                         env=child_environment(PYTHONPATH=""))  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert str(repository) in ran.stdout and "torch.Size([3, 2])" in ran.stdout


def test_another_version_of_the_package_is_named(tmp_path):
    folder = kernels_repo.write(tmp_path / "old", version=3)
    init = folder / kernels_hub.VARIANT / "__init__.py"
    init.write_text(init.read_text().replace(mla_kernels.__version__, "0.0.9"))
    with pytest.raises(
        ImportError, match=rf"written by mla_kernels 0.0.9, and mla_kernels {mla_kernels.__version__} is"
    ):
        kernels.get_local_kernel(folder)


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "repository"
    assert main(["kernels-repo", "-o", str(folder), "--version", "4"]) == 0
    assert f"wrote {folder}: " in capsys.readouterr().out
    metadata = json.loads((folder / kernels_hub.VARIANT / "metadata.json").read_text())
    assert metadata["version"] == 4 and not list(folder.rglob("*.pyc"))
    assert main(["kernels-repo", "-o", str(folder)]) == 0  # over itself
    again = json.loads((folder / kernels_hub.VARIANT / "metadata.json").read_text())
    assert again == metadata | {"version": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for output, said in (("other", "which holds something else"), ("other/file", "which holds something else")):
        with pytest.raises(SystemExit):
            main(["kernels-repo", "-o", str(tmp_path / output)])
        assert said in capsys.readouterr().err
    assert (tmp_path / "other" / "file").read_text() == "mine"
    for output in (Path(mla_kernels.__file__).parents[1], Path(mla_kernels.__file__).parent / "new"):
        with pytest.raises(SystemExit):
            main(["kernels-repo", "-o", str(output)])
        assert "one apart from it is accepted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [
        ("1", TypeError, "got str, an integer"),
        (True, TypeError, "got bool"),
        (0, ValueError, "got 0, an integer of at least"),
    ],
)
def test_versions_of_the_repository(tmp_path, version, error, said):
    with pytest.raises(error, match=f"version: {said}"):
        kernels_repo.write(tmp_path / "new", version=version)
    with pytest.raises(TypeError, match="folder: got NoneType, a path is accepted"):
        kernels_repo.write(None)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_layers_compute_what_transformers_does(repository, name, dtype):
    module = MODULES[name]().to(dtype)
    x = torch.randn(2, 9, 32).to(dtype)
    with torch.no_grad():
        want = module(x)
        assert kernels_hub.kernelize(module, repository) is module
        got = module(x)
    assert module.forward.__func__.__module__ == "mla_kernels.compat.kernels_layers"
    assert [(one.dtype, one.shape) for one in got] == [(one.dtype, one.shape) for one in want]
    for one, other in zip(got, want):
        assert distance(one, other) <= (0 if one.dtype == torch.int64 else 8)


@pytest.mark.parametrize("name", MODULES)
def test_layers_have_gradients(repository, name):
    x, found = torch.randn(1, 9, 32), []
    for with_kernels in (False, True):
        module = MODULES[name]().train()
        if with_kernels:
            kernels_hub.kernelize(module, repository)
        leaf = x.clone().requires_grad_()
        weights = module(leaf)[0 if name == "gpt_oss" else 1]
        (weights * torch.arange(weights.numel()).view_as(weights).sin()).sum().backward()
        found.append((leaf.grad, {key: value.grad for key, value in module.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    for key, grad in found[0][1].items():
        if grad is not None:
            torch.testing.assert_close(found[1][1][key], grad, msg=key)


@pytest.mark.parametrize("name", MODULES)
def test_layers_are_traced_whole(repository, name):
    module = MODULES[name]()
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
    kernels_hub.kernelize(module, repository, mode=mode)
    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        traced = torch.compile(module, fullgraph=True, backend="eager")(x)
        assert all(torch.equal(one, other) for one, other in zip(traced, module(x)))


def test_a_whole_model_generates_the_same(repository, caplog):
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = filled(transformers.GptOssForCausalLM(config))
    prompt, options = torch.randint(1, 64, (2, 7)), {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(prompt, **options)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        kernels_hub.kernelize(model, repository)
    assert not caplog.records  # nothing falls back, and nothing is said of other layers
    assert all(layer.mlp.forward.__func__ is kernels_layers.MegaBlocksMoeMLP.forward for layer in model.model.layers)
    assert torch.equal(model.generate(prompt, **options), want)


def test_the_librarys_own_calls_take_the_mapping(repository, monkeypatch):
    """For classes that have their names: transformers gives them beside a version of kernels that it takes."""
    module = gpt_oss()
    monkeypatch.setattr(GptOssMLP, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    with kernels.use_kernel_mapping(kernels_hub.mapping(repository), inherit_mapping=False):
        kernels.kernelize(module, mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=False)
    assert module.forward.__func__ is kernels_layers.MegaBlocksMoeMLP.forward


def test_what_takes_the_names():
    """Every class of transformers that looks for one of them is known here, and there is no name for latent attention,
    DeepSeek's routers or any experts: what the documentation says."""
    models = Path(transformers.__file__).parent
    found = {}
    for path in (*models.glob("models/*/modeling_*.py"), models / "integrations/mxfp4.py"):
        before = ""
        for line in path.read_text().splitlines():
            if line.startswith("class ") and before.startswith('@use_kernel_forward_from_hub("'):
                found.setdefault(before.split('"')[1], set()).add(line.split()[1].partition("(")[0])
            before = line
    assert all(found[name] <= set(classes) for name, classes in kernels_hub.LAYERS.items())
    assert not [
        name for name in found
        if name not in kernels_hub.LAYERS and any(word in name for word in ("MoE", "Moe", "Expert", "Router", "MLA"))
    ]  # fmt: skip
    named = {cls for classes in found.values() for cls in classes}
    assert not [cls for cls in named if "Deepseek" in cls and not cls.endswith(("RMSNorm", "RMSNormFn"))]


# ---------------------------------------------------------------------------------------------------------------------
# Attention by the repository's name

V3 = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
    qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, n_group=1, topk_group=1, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def test_a_latent_attention_model_attends_by_the_repositorys_name(repository, monkeypatch):
    """Where transformers takes this version of kernels; elsewhere it names those that it takes."""
    monkeypatch.setenv("LOCAL_KERNELS", f"mla/kernels={repository}")
    model = filled(transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**V3)))
    ids, mask = torch.randint(1, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0  # padding on the left
    inputs, options = {"input_ids": ids, "attention_mask": mask}, {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        want, tokens = model(**inputs).logits, model.generate(**inputs, **options)
    if not is_kernels_available():
        with pytest.raises(ImportError, match=r"0\.18\.2 <= version < 0\.19\.0"):
            model.set_attn_implementation("mla/kernels")
        return
    calls = []
    run = kernels_attention.mla_prefill
    monkeypatch.setattr(
        kernels_attention, "mla_prefill", lambda *args, **more: calls.append(more) or run(*args, **more)
    )
    model.set_attn_implementation("mla/kernels")
    with torch.no_grad():
        got = model(**inputs).logits
        assert len(calls) == 2 and all(call["causal"] for call in calls)
        assert distance(got[mask.bool()], want[mask.bool()]) <= 84
        assert torch.equal(model.generate(**inputs, **options), tokens)


@pytest.mark.parametrize("values", [16, 24, 48])
def test_attention_functions(values):
    """The two say the same, and what torch's attention does; with gradients."""
    q, k, v = torch.randn(2, 5, 3, 48), torch.randn(2, 7, 3, 48), torch.randn(2, 7, 3, values)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = kernels_attention.flash_attn_func(*leaves, causal=True, softmax_scale=0.2)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    others = [x.clone().requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(1, 2) for x in others]
    want = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.2).transpose(1, 2)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    for one, other in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, others, grad)):
        torch.testing.assert_close(one, other)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 7, 14], dtype=torch.int32)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    rows = kernels_attention.flash_attn_varlen_func(*flat, *starts, 5, torch.tensor(7), causal=True, softmax_scale=0.2)
    assert torch.equal(rows, out.flatten(0, 1))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dropout_p": 0.1}, "dropout_p: flash_attn_varlen_func over mla_prefill does not take it"),
        ({"window_size": (3, 0)}, "window_size"),
        ({"softcap": 30.0, "s_aux": torch.zeros(3)}, "softcap, s_aux"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes"),
        ({"return_attn_probs": True}, "return_attn_probs"),
    ],
)
def test_what_attention_does_not_take(more, said):
    q = torch.randn(1, 4, 3, 32)
    with pytest.raises(NotImplementedError, match=said):
        kernels_attention.flash_attn_func(q, q, q, **more)


def test_shapes_that_attention_does_not_take():
    q = torch.randn(1, 4, 3, 32)
    with pytest.raises(NotImplementedError, match="k: got 1 heads, accepted are as many as q has: 3"):
        kernels_attention.flash_attn_func(q, q[:, :, :1], q[:, :, :1])
    with pytest.raises(ValueError, match="q"):
        kernels_attention.flash_attn_func(q[0], q, q)
    with pytest.raises(NotImplementedError, match="v: got width 512"):
        kernels_attention.flash_attn_func(q, q, torch.randn(1, 4, 3, 300))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_other_models_and_folders(repository, tmp_path):
    with pytest.raises(
        TypeError, match=r"got Linear without a layer .* GptOssMLP, Mxfp4GptOssMLP, Qwen3_5MoeTopKRouter"
    ):
        kernels_hub.kernelize(nn.Linear(2, 2), repository)
    with pytest.raises(ValueError, match=r"folder: got .*, accepted is what python -m mla_kernels kernels-repo wrote"):
        kernels_hub.mapping(tmp_path)
    with pytest.raises(ValueError, match="device: got 'mps', accepted: cpu, cuda, rocm, npu"):
        kernels_hub.kernelize(gpt_oss(), repository, device="mps")
    with pytest.raises(TypeError, match=r"mode: got str, a kernels.Mode is accepted, as kernels.Mode.INFERENCE"):
        kernels_hub.kernelize(gpt_oss(), repository, mode="INFERENCE")
    with pytest.raises(TypeError, match=r"model: got NoneType, a torch.nn.Module is accepted"):
        kernels_hub.kernelize(None, repository)
    with pytest.raises(TypeError, match="folder: got int, a path is accepted"):
        kernels_hub.mapping(3)
    wrong = kernels.LocalLayerRepository(repository, layer_name="MlaAttention")
    with pytest.raises(ValueError, match="Layer `MlaAttention` not found"):
        wrong.load()


def test_experts_that_cannot_be_served_are_refused_before_anything_changes(repository):
    model = nn.ModuleList([gpt_oss(), gpt_oss()])
    del model[1].experts.gate_up_proj
    with pytest.raises(NotImplementedError, match="GptOssMLP cannot be served: gate_up_proj is not one three-dim"):
        kernels_hub.kernelize(model, repository)
    model[1] = gpt_oss()
    hook = model[1].experts.register_forward_hook(lambda *args: None)
    with pytest.raises(NotImplementedError, match="hooks on GptOssExperts, which would not run"):
        kernels_hub.kernelize(model, repository)
    assert all("forward" not in vars(module) for module in model)
    hook.remove()
    kernels_hub.kernelize(model, repository)
    model[0].router.register_forward_pre_hook(lambda *args: None)
    with pytest.raises(
        NotImplementedError, match="MegaBlocksMoeMLP of mla_kernels: GptOssMLP: hooks on GptOssTopKRouter"
    ):
        model[0](torch.randn(1, 3, 32))


@pytest.mark.parametrize("version", ["0.16.2", "0.18.2", "1.0"])
def test_other_versions_of_the_library(repository, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"takes kernels 0.17, not {version}: pip install 'kernels>=0.17,<0.18'"):
        kernels_hub.mapping(repository)


def test_without_the_library(repository, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"needs Hugging Face's kernels: pip install 'mla_kernels\[kernels\]'"):
        kernels_hub.kernelize(gpt_oss(), repository)
