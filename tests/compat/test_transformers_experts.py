"""Every class of transformers that uses its experts interface: eager's result, or a clear refusal."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_kernels.compat.transformers import experts
from mla_kernels.compat.transformers_experts import _recognise, activation_of

HIDDEN, INNER, EXPERTS = 32, 16, 4
MINOR = int(transformers.__version__.split(".")[1])
CLASSES = {18: 56, 19: 56, 20: 61, 21: 62, 22: 63, 23: 65, 24: 68}
"""How many classes each version has, 5.18 to 5.24."""
REFUSED = {
    "nemotron_h.NemotronHExperts": (18, "experts without a gate"),
    "muse_spark.MuseSparkExperts": (20, "a norm after each expert"),
    "inkling2.Inkling2Experts": (23, "its gate is not SwiGLU"),
    "inkling2_loop.Inkling2LoopExperts": (24, "its gate is not SwiGLU"),
}
"""Name: the first version with it, and why ``fused_moe`` cannot run it."""


class SmallConfig:
    """Answers whatever a class asks of its configuration with something small."""

    _experts_implementation = "eager"
    hidden_act = hidden_activation = moe_hidden_act = activation_function = "silu"
    num_experts_per_tok = moe_topk = num_experts_per_token = 2
    swiglu_limit = 7.0
    swiglu_alpha = 1.702
    initializer_range = 1.0
    num_zero_experts = zero_expert_num = 0

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        if "limit" in name:
            return 7.0
        if "intermediate" in name or "ffn" in name:
            return INNER
        if name.endswith(("hidden_size", "hidden_dim")):
            return HIDDEN
        if "expert" in name:
            return EXPERTS
        if "softcap" in name:
            return 5.0
        if "eps" in name:
            return 1e-6
        return None


def classes():
    """Every experts class of transformers, by name."""
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for file in sorted(models.glob("*/modeling_*.py")):
        if "@use_experts_implementation" not in file.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(cls, "_apply_gate"):
                found[f"{file.parent.name}.{name}"] = cls
    return found


def test_every_class_gives_eagers_result_or_a_refusal():
    refused, wrong, found = {}, {}, classes()
    assert len(found) == CLASSES[MINOR]
    for name, cls in found.items():
        torch.manual_seed(0)
        module = cls(SmallConfig())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 1.5 * HIDDEN**-0.5)
        hidden = torch.randn(9, HIDDEN) * 4
        ids = torch.rand(9, EXPERTS).argsort(1)[:, :2]
        weights = torch.rand(9, 2)
        with torch.no_grad():
            try:
                actual = experts(module, hidden, ids, weights)
            except NotImplementedError as error:
                refused[name] = str(error)
                continue
            expected = module(hidden, ids, weights)
        error = (actual - expected).abs().max() / expected.abs().max()
        if not error < 1e-5:
            wrong[name] = float(error)
    assert not wrong
    reasons = {name: reason for name, (first, reason) in REFUSED.items() if first <= MINOR}
    assert refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in refused[name]


@pytest.mark.parametrize(
    ("model", "cls", "expected"),
    [
        ("gpt_oss", "GptOssExperts", ("gpt_oss", 7.0, 1.702, True)),
        ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", ("gpt_oss", 7.0, 1.702, False)),
        ("deepseek_v4", "DeepseekV4Experts", ("pre", 7.0, 1.702, False)),
        ("step3p7", "Step3p7Experts", ("post", 7.0, 1.702, False)),
        ("deepseek_v3", "DeepseekV3Experts", ("none", None, 1.702, False)),
    ],
)
def test_gates_are_recognised(model, cls, expected):
    module = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), cls)(SmallConfig())
    if model == "step3p7":
        module.limit = 7.0  # every layer has its own there
    assert activation_of(module).arguments == expected


def test_a_limit_that_changes_is_seen():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    module = DeepseekV4Experts(SmallConfig())
    assert activation_of(module).limit == 7.0
    module.limit = 3.0
    assert activation_of(module).limit == 3.0


def _deepseek():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    return DeepseekV3Experts(SmallConfig())


def test_a_gate_is_recognised_under_the_callers_modes():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    module = GptOssExperts(SmallConfig())
    expected = activation_of(module)
    _recognise.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
            assert activation_of(module) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_gate_of_the_instance_is_refused():
    module = _deepseek()
    activation_of(module)
    module._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    with pytest.raises(NotImplementedError, match="DeepseekV3Experts: its _apply_gate was replaced by other code"):
        activation_of(module)


@pytest.mark.parametrize("kind", ["other", "parameters", "hook", "pre-hook"])
def test_an_activation_that_may_be_something_else_is_refused(kind):
    """Only silu itself is known to be silu: a class derived from it, say with a slope, could be anything."""

    class Slope(torch.nn.SiLU):
        slope = 1.0

        def forward(self, x):
            return x * torch.sigmoid(self.slope * x)

    module = _deepseek()
    reason = "its gate is not SwiGLU"
    if kind == "other":
        module.act_fn = torch.nn.GELU()
    elif kind == "parameters":
        module.act_fn = Slope()
    else:
        register = "register_forward_hook" if kind == "hook" else "register_forward_pre_hook"
        getattr(module.act_fn, register)(lambda *args: None)
        reason = "forward hooks on act_fn"
    with pytest.raises(NotImplementedError, match=reason):
        activation_of(module)


@pytest.mark.parametrize("silu", [torch.nn.SiLU(), F.silu])
def test_every_silu_is_known(silu):
    module = _deepseek()
    del module.act_fn
    module.act_fn = silu
    assert activation_of(module).arguments == ("none", None, 1.702, False)
