"""What a forward that raises in a layer leaves in the cache of an enabled model: nothing, or no use of it."""

import pytest
import torch

from mla_kernels.compat.transformers import LatentLayer, enable
from tests.compat.models import CACHE, FAMILIES, HYBRID, VOCABULARY, fast_cpu, tiny


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def fail(*_):
    raise KeyError("on purpose")


CHUNKS = (40, 1, 30, 1)


def prompts(with_padding):
    ids = torch.randint(2, VOCABULARY, (2, sum(CHUNKS)))
    return ids, (torch.arange(sum(CHUNKS)) >= torch.tensor([[0], [13]])).long() if with_padding else None


def raising(model, failing):
    handle = model.model.layers[failing].register_forward_pre_hook(fail)
    return pytest.raises(KeyError, match="on purpose"), handle


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in HYBRID and one != "LongcatFlash"])
def test_the_same_call_again_is_right(family, with_padding):
    """A prompt, a step, a chunk and a step: each raises in a layer, and then does not."""
    model = enable(tiny(family))
    ids, mask = prompts(with_padding)
    exact, past, start = None, None, 0
    wanted = []
    for chunk in CHUNKS:
        arguments = {"attention_mask": None if mask is None else mask[:, : start + chunk], CACHE: exact}
        out = model(ids[:, start : start + chunk], **arguments)
        exact, start = out[CACHE], start + chunk
        wanted.append(out.logits)
    start = 0
    for number, (chunk, want) in enumerate(zip(CHUNKS, wanted)):
        arguments = {"attention_mask": None if mask is None else mask[:, : start + chunk], CACHE: past}
        for failing in (number % 3, 2):
            expectation, handle = raising(model, failing)
            with expectation:
                model(ids[:, start : start + chunk], **arguments)
            handle.remove()
            assert past is None or past.get_seq_length() == start
        out = model(ids[:, start : start + chunk], **arguments)
        past, start = out[CACHE], start + chunk
        torch.testing.assert_close(out.logits, want, atol=1e-5, rtol=0)


def test_refused_arguments_leave_the_cache_too():
    """A refusal before the forward begins must not take the last forward's tokens for its own."""
    model = enable(tiny("DeepseekV3"))
    ids = torch.randint(2, VOCABULARY, (1, 9))
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="attention_mask: got 3 tokens"):
        model(ids[:, :1], attention_mask=torch.ones(1, 3), **{CACHE: cache})
    assert cache.get_seq_length() == 9 and cache.layers[2].seq_lens.tolist() == [9]


@pytest.mark.parametrize("family", HYBRID or ["DeepseekV3"])  # older versions have none of them
def test_states_of_linear_attention(family):
    """A first forward is forgotten, linear layers' states too; later their states are not known, and that is said."""
    model = enable(tiny(family))
    ids = torch.randint(2, VOCABULARY, (2, 20))
    want = model(ids, use_cache=False).logits
    cache = model(ids, use_cache=True)[CACHE]
    cache.reset()
    expectation, handle = raising(model, -1)
    with expectation:
        model(ids, **{CACHE: cache})
    assert cache.get_seq_length() == 0
    handle.remove()
    out = model(ids[:, :19], **{CACHE: cache})
    step = model(ids[:, 19:], **{CACHE: out[CACHE]})
    torch.testing.assert_close(step.logits[:, 0], want[:, -1], atol=1e-4, rtol=0)
    expectation, handle = raising(model, -1)
    with expectation:
        model(ids[:, :1], **{CACHE: cache})
    handle.remove()
    latent = next(layer for layer in cache.layers if isinstance(layer, LatentLayer))
    assert latent.get_seq_length() == 20
    if not HYBRID:
        return
    with pytest.raises(RuntimeError, match=r"an earlier forward with this cache raised.*begin with a new cache"):
        model(ids[:, :1], **{CACHE: cache})
