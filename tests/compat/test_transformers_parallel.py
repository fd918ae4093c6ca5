"""Models that transformers shards over two processes: enabled, they generate what one process generates."""

import contextlib

import pytest
import torch
import transformers

from tests.compat import sharded_models
from tests.compat.models import CACHE, FAMILIES
from tests.moe.ranks import Ranks

MINOR = int(transformers.__version__.split(".")[1])
TENSOR = dict(tp_plan="auto", tp_size=2)
EXPERT = dict(tp_size=2, ep_size=2) if MINOR > 18 else TENSOR | dict(enable_expert_parallel=True)


@pytest.fixture(scope="module")
def ranks():
    with contextlib.closing(Ranks(2)) as group:
        yield group


def _sizes(family):
    heads = 6 if family == "Glm4MoeLite" else 4  # 3 a rank, and 2
    return dict(num_attention_heads=heads, num_key_value_heads=heads, vocab_size=200, tie_word_embeddings=False)


def _check(outcomes):
    for (expected, logits, _), theirs, ours, again in outcomes:
        assert theirs[2] == again[2] != "LatentLayer" == ours[2]
        for tokens, scores, _ in (theirs, ours, again):
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(scores, logits, atol=1e-4, rtol=0)


# What transformers itself cannot run: its plan for GLM-5-next shards o_proj of linear layers, but not what it is
# multiplied by, and before 5.24 its eager attention of HY-V4 joins sharded sinks with plain scores.
UNSHARDED = ("Glm5Next",) if CACHE == "cache" else ("Glm5Next", "HYV4")


# Sharded like one of the others
ALIKE = ("AXK1", "AXK2", "GlmMoeDsa", "Mistral4", "MistralLarge4", "Youtu")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNSHARDED])
@pytest.mark.slow(when=lambda family: family in ALIKE)
def test_tensor_parallel(family, ranks):
    _check(ranks.run(sharded_models.generate, family, _sizes(family), TENSOR, 6))


@pytest.mark.parametrize("family", ["DeepseekV32", "GlmMoeDsa"])
@pytest.mark.slow(when=lambda family: family in ALIKE)
def test_tensor_parallel_past_top_k(family, ranks):
    _check(ranks.run(sharded_models.generate, family, _sizes(family) | dict(index_topk=16), TENSOR, 6))


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV32"])
def test_expert_parallel(family, ranks):
    _check(ranks.run(sharded_models.generate, family, _sizes(family), EXPERT, 4))


@pytest.mark.parametrize("family", ["DeepseekV3", "LongcatFlash"])
def test_fully_sharded(family, ranks):
    _check(ranks.run(sharded_models.generate, family, _sizes(family), dict(fsdp_size=2), 4))


@pytest.mark.parametrize("family", ["DeepseekV2", "MiniCPM3", "LongcatFlash"])
def test_gradients_of_tensor_parallel_models(family, ranks):
    for gradients in ranks.run(sharded_models.gradients, family, _sizes(family), TENSOR):
        for name, actual, expected in gradients:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_stages_of_a_pipeline_are_refused(ranks):
    for _, error in ranks.outcomes(sharded_models.generate, "DeepseekV3", _sizes("DeepseekV3"), dict(pp_size=2), 2):
        assert error[0] == "NotImplementedError"
        assert "this DeepseekV3Model is one stage of a pipeline of transformers, whole models are accepted" in error[1]
