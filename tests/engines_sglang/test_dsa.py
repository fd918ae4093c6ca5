"""DeepSeek-V3.2 and GLM-5 in SGLang's own model runner over this library's kernels, beside transformers' models.

SGLang's indexer scores in float8, transformers' in the model's dtype, and both keep the best 64 of up to 150 tokens:
the judge attends to the picks that SGLang's side made, which are held against their own scores apart.
"""

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from mla_kernels.compat import sglang_dsa_backend
from mla_kernels.latent.cache import CacheLayout
from tests.engines_sglang import small_dsa

EXTEND, MIXED, DECODE, VERIFY = (
    getattr(ForwardMode, name) for name in ("EXTEND", "MIXED", "DECODE", "TARGET_VERIFY")
)  # fmt: skip
WHOLE = [(EXTEND, [(0, 150)]), (EXTEND, [(1, 90)]), (EXTEND, [(2, 76)])]
STEPS = [
    (EXTEND, [(0, 100), (1, 60)]),
    (MIXED, [(0, 1), (1, 1), (2, 40)]),
    (DECODE, [(0, 1), (1, 1), (2, 1)]),
    (DECODE, [(0, 1), (1, 1), (2, 1)]),
    (VERIFY, [(0, 3), (1, 3), (2, 3)]),
    (EXTEND, [(0, 44), (1, 24), (2, 31)]),
]
"""Prompts together, over a prefix, beside decoding, decoding alone, three drafts each to verify."""
MODELS = {"deepseek": small_dsa.V32, "glm": small_dsa.GLM}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        small_dsa.on_cpu(patch)
        yield


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    shape = MODELS[request.param]
    return shape, small_dsa.judge(shape)


def answers(judge, prompt, picks):
    """(logits where each layer attends to ``picks``, the part of them that transformers' own scores choose, too)."""
    shared = []
    with pytest.MonkeyPatch.context() as patch:
        for index, layer in enumerate(judge.model.layers):
            chosen = picks[index]
            tokens = torch.arange(len(prompt), dtype=torch.int32)[:, None]
            seen = torch.arange(small_dsa.TOP_K, dtype=torch.int32).expand(len(prompt) - len(chosen), -1)  # all, if few
            chosen = torch.cat([torch.where(seen > tokens[: len(seen)], -1, seen), chosen])
            chosen = torch.where(chosen < 0, tokens, chosen)[None]  # the token itself is among them, or no pick

            def forward(*args, score=layer.self_attn.indexer.forward, chosen=chosen, **others):
                own = score(*args, **others)
                hits = (chosen[0, :, :, None] == own[0, :, None]).any(-1)
                shared.append(hits[small_dsa.TOP_K :].float().mean())
                return chosen

            patch.setattr(layer.self_attn.indexer, "forward", forward)
        with torch.no_grad():
            logits = judge(torch.tensor([prompt])).logits[0]
    return logits, torch.stack(shared).mean()


@pytest.fixture
def scored(monkeypatch):
    """[(scores, lengths, top_k, starts, picks)] of the choices that the indexers made."""
    made = []
    choose = sglang_dsa_backend.best_positions

    def best(logits, lengths, topk, row_starts):
        picks = choose(logits, lengths, topk, row_starts)
        made.append((logits.clone(), lengths.clone(), topk, row_starts, picks.clone()))
        return picks

    monkeypatch.setattr(sglang_dsa_backend, "best_positions", best)
    return made


@pytest.fixture
def attended(monkeypatch):
    """[(result, q, cache, slots, scale)] of the attention that was computed."""
    made = []
    attend = sglang_dsa_backend.sparse_mla_decode

    def record(q, cache, slots, *, softmax_scale, **options):
        out, lse = attend(q, cache, slots, softmax_scale=softmax_scale, **options)
        made.append((out.clone(), q.clone(), cache.data.clone(), cache.layout, slots.clone(), softmax_scale))
        return out, lse

    monkeypatch.setattr(sglang_dsa_backend, "sparse_mla_decode", record)
    return made


def check_picks(made):
    """Picks are the best of the scores, by the scores alone, in ascending order."""
    for logits, lengths, topk, starts, picks in made:
        for row, (length, got) in enumerate(zip(lengths.tolist(), picks)):
            start = 0 if starts is None else int(starts[row])
            own = logits[row, start : start + length]
            best = own.sort(descending=True, stable=True).indices[:topk].sort().values
            assert got[: len(best)].equal(best.int()) and (got[len(best) :] == -1).all()


def check_attention(made):
    """The plain computation in float64, of the rows that the slots name."""
    for out, q, data, layout, slots, scale in made:
        rows = data.flatten(0, 1)
        if layout is CacheLayout.FP8_V32:
            latents = rows[:, :512].view(torch.float8_e4m3fn).double().unflatten(1, (4, 128))
            latents = (latents * rows[:, 512:528].view(torch.float32).double()[..., None]).flatten(1)
            rows = torch.cat((latents, rows[:, 528:].view(torch.bfloat16).double()), 1)
        for token, chosen in enumerate(slots[:, 0]):
            keys = rows[chosen[chosen >= 0].long()].double()
            scores = q[token, 0].double() @ keys.T * scale
            want = scores.softmax(-1) @ keys[:, :512]
            assert (out[token, 0] - want).abs().max() < 0.01 * want.abs().max()


@pytest.mark.parametrize("cache_dtype, error", [("bfloat16", 0.03), ("fp8_e4m3", 0.08)])
@pytest.mark.parametrize("schedule", [WHOLE, STEPS], ids=["whole", "steps"])
def test_logits_are_those_of_transformers(model, cache_dtype, error, schedule, scored, attended):
    shape, judge = model
    engine = small_dsa.Engine(shape, judge.state_dict(), "--kv-cache-dtype", cache_dtype)
    engine.backend.speculative_num_draft_tokens = 3
    texts = small_dsa.prompts()
    served = small_dsa.serve(engine, texts, schedule)
    assert isinstance(engine.backend, sglang_dsa_backend.SparseBackend) and scored and attended
    check_picks(scored)
    check_attention(attended)
    for text, cached, (logits, picks) in zip(texts, small_dsa.CACHED, served, strict=True):
        want, shared = answers(judge, text, picks)
        worst = (logits - want[cached:]).abs().max() / want.abs().max()
        assert worst < error and shared > 0.9, (worst, shared)
