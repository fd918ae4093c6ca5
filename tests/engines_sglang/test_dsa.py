"""DeepSeek-V3.2 and GLM-5 in SGLang's own model runner over this library's kernels, beside transformers' models.

SGLang's indexer scores in float8, transformers' in the model's dtype, and both keep the best 64 of up to 150 tokens:
the judge attends to the picks that SGLang's side made, which are held against their own scores apart.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from mla_kernels import launch
from mla_kernels.compat import sglang_dsa_backend
from mla_kernels.latent.cache import CacheLayout
from tests.engines_sglang import small_dsa

EXTEND, MIXED, DECODE, VERIFY, DRAFT = (
    getattr(ForwardMode, name) for name in ("EXTEND", "MIXED", "DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")
)
WHOLE = [(EXTEND, [(0, 150)]), (EXTEND, [(1, 90)]), (EXTEND, [(2, 76)])]
STEPS = [
    (EXTEND, [(0, 100), (1, 60)]),
    (MIXED, [(0, 1), (1, 1), (2, 40)]),
    (DECODE, [(0, 1), (1, 1), (2, 1)]),
    (DECODE, [(0, 1), (1, 1), (2, 1)]),
    (VERIFY, [(0, 3), (1, 3), (2, 3)]),
    (DRAFT, [(0, 3), (1, 3), (2, 3)]),
    (EXTEND, [(0, 41), (1, 21), (2, 28)]),
]
"""Prompts together, over a prefix, beside decoding, decoding alone, three drafts each to verify, and to extend by."""
MODELS = {"deepseek": small_dsa.V32, "glm": small_dsa.GLM}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    with pytest.MonkeyPatch.context() as patch, launch.on_cpu("torch"):
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


@pytest.fixture(scope="module")
def engine():
    return small_dsa.Engine(small_dsa.V32, small_dsa.judge(small_dsa.V32).state_dict())


def test_scores_in_parts_give_the_same_picks(engine, monkeypatch):
    """SGLang scores long prompts by rows, as many as the memory allows."""
    from sglang.srt.layers.attention.dsa import dsa_indexer

    texts = small_dsa.prompts()
    request = [(1, [3, 7, 1], texts[0], 0), (2, [2, 9], texts[1], 0)]
    whole, picks = engine.step(EXTEND, request)
    monkeypatch.setattr(dsa_indexer, "mqa_logits_should_chunk", lambda **sizes: (True, 7 * 4 * sizes["num_cols"]))
    parts, again = engine.step(EXTEND, request)
    assert whole.equal(parts) and all(picks[layer].equal(again[layer]) for layer in picks)


@pytest.mark.parametrize("mode, drafts", [(DECODE, 1), (VERIFY, 3), (DRAFT, 3)], ids=["decode", "verify", "extend"])
def test_captured_metadata_serve_later_batches(engine, monkeypatch, mode, drafts):
    """SGLang captures a graph of one batch and writes the next one's metadata where the graph reads them."""
    if drafts > 1:
        monkeypatch.setattr(engine.backend, "speculative_num_draft_tokens", drafts)
    texts = small_dsa.prompts()
    engine.step(EXTEND, [(1, [3, 7, 1], texts[0][:100], 0), (2, [2, 9], texts[1][:60], 0)])
    later = [(1, [3, 7, 1], texts[0][100 : 100 + drafts], 100), (2, [2, 9], texts[1][60 : 60 + drafts], 60)]
    want, picks = engine.step(mode, later)
    captured = engine.capture(mode, [(3, [4], [5] * drafts, 0), (4, [5], [6] * drafts, 0)])
    got, again = engine.step(mode, later, replayed=True)
    assert engine.backend.forward_metadata is captured
    assert got.equal(want) and all(picks[layer].equal(again[layer]) for layer in picks)


def test_drafts_get_the_same_class(engine):
    """SGLang's draft workers make backends of the class that they find."""
    assert dsa_backend.DeepseekSparseAttnBackend is type(engine.backend) is sglang_dsa_backend.SparseBackend


def test_picks_are_positions_that_a_token_sees(engine):
    """Whatever layer made them: GLM-5's layers share them."""
    texts = small_dsa.prompts()
    _, picks = engine.step(EXTEND, [(1, [3, 7, 1], texts[0], 0)])
    lengths = torch.arange(1, 151)[:, None]
    for chosen in picks.values():
        assert (chosen < lengths).all() and ((chosen >= 0).sum(1) == lengths[:, 0].clamp(max=small_dsa.TOP_K)).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("dcp_size", 2),
        ("dsa_index_kpool", 4),
        ("hisparse_coordinator", object()),
        ("_kv_shard_pool", object()),
        ("kv_lora_rank", 256),
        ("qk_rope_head_dim", 0),
    ],
)
def test_what_attention_does_not_compute_is_refused_before_serving(engine, monkeypatch, name, value):
    monkeypatch.setattr(engine.backend, name, value)
    told = {"dsa_index_kpool": "index_kpool", "hisparse_coordinator": "hisparse", "_kv_shard_pool": "sharding"}
    with pytest.raises(NotImplementedError, match=f"mla_kernels: .*{told.get(name, name)}: got .* is accepted"):
        engine.backend._refuse(engine.runner)


def test_other_caches_are_refused_before_serving(engine, monkeypatch):
    monkeypatch.setattr(engine.runner.token_to_kv_pool, "dtype", torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"kv_cache_dtype: got torch\.float8_e4m3fn in 576 columns"):
        engine.backend._refuse(engine.runner)
    monkeypatch.setattr(engine.backend, "dsa_kv_cache_store_fp8", True)
    monkeypatch.setattr(engine.runner, "dtype", torch.float16)
    with pytest.raises(NotImplementedError, match=r"dtype: got torch\.float16 over fp8_e4m3"):
        engine.backend._refuse(engine.runner)


def test_layers_that_attention_does_not_compute_are_refused(engine):
    layer = engine.runner.model.model.layers[0].self_attn.attn_mqa
    q, picks = torch.zeros(2, 4 * 512), torch.zeros(2, 64, dtype=torch.int32)
    attend = partial(engine.backend._attend, q, None, layer, None, False, expanded=True)
    with pytest.raises(ValueError, match="topk_indices: got None"):
        attend()
    with pytest.raises(NotImplementedError, match="cos_sin_cache: got Tensor"):
        attend(topk_indices=picks, cos_sin_cache=q)
    for name, value in (("logit_cap", 30.0), ("sliding_window_size", 128), ("is_cross_attention", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, name, value)
            with pytest.raises(NotImplementedError, match=f"layer.{name}: got {value}"):
                attend(topk_indices=picks)


def test_sinks_take_weight(engine, attended):
    """HYV4's learnt sinks, which SGLang gives to FlashMLA alone: the result times sigmoid(lse - sink)."""
    texts = small_dsa.prompts()
    engine.step(EXTEND, [(1, [2, 9], texts[1], 0)])
    layer = engine.runner.model.model.layers[1].self_attn.attn_mqa
    q = attended[-1][1]
    sink = torch.tensor([float("inf"), 4.0, 6.0, float("-inf")])
    picks = torch.arange(64, dtype=torch.int32).expand(90, -1).contiguous()
    attend = partial(engine.backend._attend, q[:, 0], None, layer, None, False, expanded=False, topk_indices=picks)
    plain, scaled = attend(), attend(attn_sink=sink)
    assert scaled[:, 3].equal(plain[:, 3]) and not scaled[:, 0].any()
    assert (scaled[:, 1:3].float().norm(dim=-1) < 0.95 * plain[:, 1:3].float().norm(dim=-1)).all()


def test_a_backend_of_other_implementations_is_sglang_s_own(engine, monkeypatch):
    theirs = type(engine.backend).__mro__[1]
    for method in ("forward_extend", "forward_decode"):
        monkeypatch.setattr(theirs, method, lambda self, *arguments, called=method, **options: called)
    batch = SimpleNamespace(forward_mode=EXTEND)
    for name in ("dsa_prefill_impl", "dsa_decode_impl"):
        monkeypatch.setattr(engine.backend, name, "flashmla_kv")
    assert engine.backend.forward_extend(1, 2, 3, 4, batch) == "forward_extend"
    assert engine.backend.forward_decode(1, 2, 3, 4, batch) == "forward_decode"
