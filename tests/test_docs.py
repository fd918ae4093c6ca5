"""The README and the documentation: every example runs, and what the text names exists.

All ``python`` blocks of a page are one module, made from the page with its other lines left empty, so that a traceback
names the page's own line. CPU tensors run the torch code, and "cuda" stands for "cpu". What a page downloads is a tiny
model or file here, made by a set-up of that page.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import mla_kernels
from mla_kernels import launch, nn
from tests import published, test_rooms
from tests.children import child_environment

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))}
TEXTS = {page: path.read_text() for page, path in PAGES.items()}
KERNEL_PAGE = "writing-a-kernel.md"  # a test file of its own
NPU_PAGE = "emulated-npu.md"  # run in tests/npu/model_cases.py, in a process with that device
EXAMPLES = {"README.md", "guide.md", "checkpoints.md", "drop-in.md", "hub-kernels.md", "onnx.md", "tiles.md"}
EXAMPLES |= {KERNEL_PAGE, NPU_PAGE}
SIZES = dict(hidden_size=256, moe_intermediate_size=128, num_experts_per_tok=2, num_attention_heads=4)
TINY_V2 = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=16,
    qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, topk_method="greedy", max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What stands in for a download


def a_model(patch, folder):
    """A tiny DeepSeek-V2 with random weights, in the dtype that is asked for."""

    def from_pretrained(name, *, dtype, device_map):
        assert name == "deepseek-ai/DeepSeek-V2-Lite" and device_map == "cpu"
        model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**TINY_V2))
        return model.to(dtype).eval().requires_grad_(False)

    patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)


def a_layer_in_fp8(patch, folder):
    """The third layer of a narrow DeepSeek-V3 with four experts, in the names and dtypes of the published file."""
    config = transformers.DeepseekV3Config(
        **SIZES, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        num_hidden_layers=4, q_lora_rank=128, kv_lora_rank=128,
    )  # fmt: skip
    patch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: config)
    moe, prefix = nn.MoEConfig.from_hf(config, 3), "model.layers.3."
    state, _ = published.store(published.expert_names(moe, f"{prefix}mlp."), published.fp8)
    state[f"{prefix}mlp.gate.weight"] = torch.randn(moe.num_experts, moe.hidden_size).bfloat16()
    state[f"{prefix}mlp.gate.e_score_correction_bias"] = torch.randn(moe.num_experts)
    for name, value in nn.LatentAttention(nn.AttentionConfig.from_hf(config, 3)).state_dict().items():
        whole = f"{prefix}self_attn.{name}"
        matrix = value.dim() == 2
        state |= published.fp8(whole.removesuffix(".weight"), value)[0] if matrix else {whole: value.bfloat16()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model-00002-of-000163.safetensors")


SETUPS = {"README.md": a_model, "drop-in.md": a_model, "checkpoints.md": a_layer_in_fp8}


# ---------------------------------------------------------------------------------------------------------------------
# Running a page


def code(text: str) -> str:
    """The page's ``python`` blocks at the lines where they stand, every other line empty."""
    lines, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:].strip() or "none" if language is None else None
            lines.append("")
        else:
            lines.append(line if language == "python" else "")
    assert language is None, "a fence is not closed"
    return "\n".join(lines) + "\n"


def module_of(page: str, folder: Path) -> Path:
    path = folder / f"{Path(page).stem.replace('-', '_')}_page.py"
    path.write_text(code(TEXTS[page]).replace('"cuda"', '"cpu"'))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(page)``: its blocks in one namespace, in a folder of their own; the names that they leave."""

    def run(page: str) -> dict:
        monkeypatch.chdir(tmp_path)
        SETUPS.get(page, lambda patch, folder: None)(monkeypatch, tmp_path)
        spec = importlib.util.spec_from_file_location(f"page_{Path(page).stem}", module_of(page, tmp_path))
        module = importlib.util.module_from_spec(spec)
        with launch.on_cpu("torch"):
            spec.loader.exec_module(module)
        return vars(module)

    return run


def finite(*tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_pages_with_examples():
    """Those that have none are meant to have none."""
    assert {page for page, text in TEXTS.items() if "```python" in text} == EXAMPLES


def test_readme(run):
    names = run("README.md")
    assert names["out"].shape == (1, 1, 128, 512) and finite(names["out"], names["lse"])
    assert names["ids"].shape == (1, 3 + 8)
    assert names["model"].config._attn_implementation == "mla_kernels"


def test_guide(run):
    names = run("guide.md")
    assert names["attended"].shape == (2, 16 * 128) and names["prefilled"].shape == (100, 16, 128)
    assert names["sparse"].shape == (2, 1, 16, 512) and names["result"].shape == (100, 16, 512)
    assert bool((names["picks"] >= 0).all()) and bool((names["rows"][-1] >= 0).all())
    shapes = [tuple(names[name].shape) for name in ("y", "z", "back", "shared")]
    assert shapes == [(100, 512)] * 4 and finite(*(names[name] for name in ("y", "z", "back", "shared")))
    for leaf in (names["k_rope"], names["latents"], names["router_logits"], names["layer"].gate.weight):
        assert leaf.grad is not None and finite(leaf.grad)
    assert set(names["bias"].abs().tolist()) <= {0.0, torch.tensor(1e-3).item()} and names["bias"].any()


def test_checkpoints(run):
    names = run("checkpoints.md")
    for name in ("z", "rounded"):
        error = (names[name] - names["y"]).float().norm() / names["y"].float().norm()
        assert error < 0.06, f"{name} is {error:.3f} away from the layer of numbers"
    assert names["experts"].num_experts == 4 and finite(names["routed"])
    assert names["coded"].experts.weights.format == "fp8_block"
    assert names["moe"].gate.weight.dtype == torch.float32


def test_drop_in(run):
    names = run("drop-in.md")
    assert torch.equal(names["before"], names["after"]) and torch.equal(names["before"], names["same"])
    assert names["out"].shape == (2, 1, 16, 512) and names["lse"].shape == (2, 16, 1)
    assert names["kv_cache"].any() and finite(names["y"], names["z"])


def test_hub_kernels(run):
    names = run("hub-kernels.md")
    layers = names["kernel"].layers
    assert all(layer.mlp.forward.__func__ is layers.MegaBlocksMoeMLP.forward for layer in names["model"].model.layers)


def test_tiles(run):
    assert run("tiles.md")["y"].shape == (100, 256)


def test_onnx(run):
    names = run("onnx.md")
    assert [value.name for value in names["session"].get_outputs()][1:] == ["data_out"]
    assert names["difference"] < 1e-5 and names["written"].any()


def test_writing_a_kernel(tmp_path):
    """The page is a test file: on every backend, and by every target's compiler. In a process of its own, for it
    declares a kernel and an op."""
    path = module_of(KERNEL_PAGE, tmp_path)
    environment = child_environment()
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "tests.conftest"]
    options += ["--backend", "cpu,interpret,npu-emulated", "--no-turns", "-p", "no:cacheprovider", "-p", "no:xdist"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0 and "29 passed" in child.stdout, child.stdout + child.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What the text names


def test_paths_exist():
    """Paths in backquotes, from the root of the repository, and the targets of links and pictures."""
    folders = "mla_kernels|reference|autotune|tests|bench|docs|findings"
    named = 0
    for page, text in TEXTS.items():
        for path in re.findall(rf"`((?:{folders})/[\w./*-]*)`", text):
            assert list(ROOT.glob(path.rstrip("/"))), f"{page}: {path}"
            named += 1
        for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text):
            assert (PAGES[page].parent / target).exists(), f"{page}: {target}"
            named += 1
    assert named > 50


def test_every_page_is_in_the_navigation():
    assert set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text())) == {p.name for p in DOCS.glob("*.md")}


def test_environment_variables_are_all_named():
    """Those of the package and those of the documentation are the same, and few."""
    pattern = re.compile(r"MLA_KERNELS_(?!SPARSE)[A-Z]+(?:_[A-Z]+)*")  # that one is a backend in vLLM
    used = set()
    for folder in ("mla_kernels", "autotune", "reference", "tests", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            used |= set(pattern.findall(file.read_text()))
    named = {name for text in TEXTS.values() for name in pattern.findall(text)}
    assert used == named == set(pattern.findall(TEXTS["index.md"]))
    assert len(used) <= 4  # and TRITON_INTERPRET


def test_the_readme_is_short_and_names_every_public_function():
    assert len(TEXTS["README.md"].splitlines()) <= 120
    helpers = {"CacheLayout", "Dispatch", "PrologWeights", "WeightError", "WeightFormat"}
    missing = {name for name in mla_kernels.__all__ if f"`{name}`" not in TEXTS["README.md"]}
    assert missing == helpers


def test_pictures_and_figures_are_what_the_data_gives():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, picture in draw.PICTURES.items():
        assert (DOCS / "images" / name).read_text() == picture(), f"{name}: run python docs/draw.py"
    for (names, _), floor in zip(draw.FLOORS, test_rooms.FLOORS, strict=True):
        assert set(names.split(", ")) <= set().union(*floor)
    assert draw.page() == TEXTS["performance.md"], "run python docs/draw.py"
    ratios = r"\d+\.\d\d \(\d+\.\d\d, \d+\.\d\d\)"
    assert set(re.findall(ratios, TEXTS["README.md"])) < set(re.findall(ratios, TEXTS["performance.md"]))
