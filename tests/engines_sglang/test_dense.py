"""The dense backend under SGLang's own batches: its kit of tests for backends, and beside float64."""

import unittest
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods import dense_attention
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as kit
from sglang.test.kits.attention_unittest.runner_modes import (
    cuda_graph_decode_runner,
    speculative_draft_extend_runner,
    speculative_draft_runner,
    speculative_target_verify_runner,
    split_op_runner,
)

from mla_kernels.compat import sglang_attention

NAME = "mla_kernels"
SIZES = {"kv_lora_rank": 128, "qk_rope_head_dim": 64, "dtype": torch.bfloat16}
CASES = {case.name: case for case in kit.make_mla_cases(NAME)}
EXTENDS = [name for name, case in CASES.items() if not case.forward_mode.is_decode()]
DECODES = [name for name in CASES if name not in EXTENDS]


def case(mode, page_size, prefix_lens, extend_lens=(), num_heads=4):
    return kit.MLAAttentionCase(
        name=mode.name.lower(), backend=NAME, forward_mode=mode, num_heads=num_heads, page_size=page_size,
        prefix_lens=prefix_lens, extend_lens=extend_lens,
    )  # fmt: skip


def in_order(layout, *, page_size, max_context_len, **others):
    return lambda request, position: page_size + request * max_context_len + position


class TestKit:
    """What SGLang asks of its own backends (``sglang.test.kits``): its batches and its reference."""

    judge = unittest.TestCase()

    @pytest.mark.parametrize("layout", ["shuffled_pages", "interleaved_pages", "contiguous"])
    @pytest.mark.parametrize("name", CASES)
    def test_eagerly(self, name, layout):
        kit.run_mla_attention_case(self.judge, CASES[name], loc_layout=layout, **SIZES)

    @pytest.mark.parametrize("name", DECODES)
    def test_replay(self, name):
        """Capture and replay of metadata, in padded batches; the graph itself needs a device."""
        cuda_graph_decode_runner.run_mla_cuda_graph_decode_case(self.judge, CASES[name], **SIZES)

    @pytest.mark.parametrize("breakable", [True, False])
    @pytest.mark.parametrize("name", EXTENDS)
    def test_prefill_between_pieces_of_a_graph(self, name, breakable):
        tokens = CASES[name].num_input_tokens + 5
        split_op_runner.run_mla_split_op_extend_case(
            self.judge, CASES[name], breakable=breakable, static_num_tokens=tokens, **SIZES
        )

    @pytest.mark.parametrize("page_size", [1, 16])
    def test_verification_of_a_chain(self, page_size, monkeypatch):
        asked = case(ForwardMode.TARGET_VERIFY, page_size, (14, 15, 3), (3, 3, 3))
        speculative_target_verify_runner.run_mla_eagle_verify_case(self.judge, asked, topk=1, **SIZES)
        # its graphs' cases write prefixes once more, in order, over those that it has shuffled
        monkeypatch.setattr(dense_attention, "make_loc_fn", in_order)
        speculative_target_verify_runner.run_mla_eagle_verify_cuda_graph_case(self.judge, asked, topk=1, **SIZES)

    def test_a_tree_is_refused(self):
        asked = case(ForwardMode.TARGET_VERIFY, 1, (14, 15), (3, 3))
        with pytest.raises(NotImplementedError, match=r"spec_info\.topk: got 2, 1 is accepted"):
            speculative_target_verify_runner.run_mla_eagle_verify_case(self.judge, asked, topk=2, **SIZES)

    @pytest.mark.parametrize("pad_style", ["small_real", "prod_fill"])
    @pytest.mark.parametrize("page_size", [1, 16])
    def test_draft_extension(self, page_size, pad_style):
        asked = case(ForwardMode.DRAFT_EXTEND_V2, page_size, (14, 15, 3), (3, 3, 3))
        speculative_draft_extend_runner.run_mla_draft_extend_v2_cuda_graph_case(
            self.judge, asked, pad_style=pad_style, **SIZES
        )


def plain(q, pool, slots, scale, latent):
    """q [queries, heads, width], the newest of the tokens at ``slots``, over them: (out, lse) in float64."""
    keys = pool[slots, 0].double()
    scores = torch.einsum("qhd,kd->qhk", q.double(), keys) * scale
    queries, _, tokens = scores.shape
    hidden = torch.arange(tokens) > torch.arange(tokens - queries, tokens)[:, None]
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return scores.softmax(-1) @ keys[:, :latent], scores.logsumexp(-1)


class Held:
    """A backend with SGLang's pool, NaN but where it was written, and batches of random queries and latents."""

    LATENT, ROPE = 512, 64

    def __init__(self, asked, heads):
        made = kit.build_mla_attention_fixture(
            unittest.TestCase(), asked, kv_lora_rank=self.LATENT, qk_rope_head_dim=self.ROPE, dtype=torch.bfloat16,
            max_context_len=128,
        )  # fmt: skip
        self.asked, self.backend, self.batch, self.runner = asked, made.backend, made.forward_batch, made.runner
        self.layer, self.heads = made.actual_module.attn_mqa, heads
        self.pool = made.runner.token_to_kv_pool.kv_buffer[0]
        self.rows = made.runner.req_to_token_pool.req_to_token
        self.pool.fill_(torch.nan)
        torch.manual_seed(3)
        for row, prefix in zip(self.rows, asked.prefix_lens):
            slots = row[:prefix].long()
            self.pool[slots] = torch.randn(prefix, 1, self.LATENT + self.ROPE).bfloat16()
        tokens = asked.num_input_tokens
        self.q = torch.randn(tokens, heads, self.LATENT + self.ROPE).bfloat16()
        self.k = torch.randn(tokens, 1, self.LATENT + self.ROPE).bfloat16()

    def attend(self, batch=None, q=None, k=None, prepare=True):
        batch, q, k = batch or self.batch, self.q if q is None else q, self.k if k is None else k
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.backend)):
            if prepare:
                self.backend.init_forward_metadata(batch)
            return self.layer(q.flatten(1), k, k[..., : self.LATENT], batch, return_lse=True)

    def check(self, out, lse):
        begin = 0
        for row, prefix, new in zip(self.rows, self.asked.prefix_lens, self.asked.input_lens):
            end = begin + new
            want = plain(self.q[begin:end], self.pool, row[: prefix + new].long(), self.layer.scaling, self.LATENT)
            got = out[begin:end].view(new, self.heads, self.LATENT), lse[begin:end]
            for ours, exact, error in zip(got, want, (0.01, 1e-4)):
                assert (ours - exact).abs().max() < error * exact.abs().max()
            begin = end


DECODE, EXTEND = ForwardMode.DECODE, ForwardMode.EXTEND


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(
    "mode, prefixes, new, heads",
    [
        (DECODE, (0, 1, 63, 64, 100), (), 16),
        (DECODE, (40,), (), 3),
        (EXTEND, (0, 0, 0), (1, 64, 65), 16),
        (EXTEND, (0, 64, 63, 20), (40, 1, 2, 40), 5),
        (ForwardMode.MIXED, (0, 64, 90), (33, 1, 1), 1),
    ],
)
def test_beside_float64(mode, prefixes, new, heads, page_size):
    held = Held(case(mode, page_size, prefixes, new, heads), heads)
    held.check(*held.attend())


def test_long_prompts_are_taken_in_pieces(monkeypatch):
    monkeypatch.setattr(sglang_attention, "PIECE", 16)
    held = Held(case(EXTEND, 64, (0, 30), (65, 17), 2), 2)
    held.check(*held.attend())


def test_bits_do_not_depend_on_chunks():
    """Deterministic inference: a token is the same, read whole, in a chunk or decoded."""
    whole = Held(case(EXTEND, 64, (0,), (40,), 16), 16)
    whole.backend.batch_invariant = True
    out, _ = whole.attend()
    for begin, end, mode in ((0, 25, EXTEND), (25, 39, EXTEND), (39, 40, DECODE)):
        part = Held(case(mode, 64, (begin,), (end - begin,) if mode is EXTEND else (), 16), 16)
        part.backend.batch_invariant = True
        part.pool[part.rows[0, :begin].long()] = whole.pool[whole.rows[0, :begin].long()]
        chunk, _ = part.attend(q=whole.q[begin:end], k=whole.k[begin:end])
        assert torch.equal(chunk.flatten(), out[begin:end].flatten())


def test_metadata_keeps_its_addresses():
    """A captured graph reads the tensors of the state that was made for it; rows beyond the batch are not written."""
    held = Held(case(DECODE, 64, (100, 30), (), 16), 16)
    backend = held.backend
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=4)
    backend.init_forward_metadata_out_graph(held.batch, in_capture=True)
    first = backend.forward_metadata.pages
    held.batch.seq_lens[:] = held.batch.seq_lens_cpu[:] = torch.tensor([5, 7])
    backend.init_forward_metadata_out_graph(held.batch)
    second = backend.forward_metadata.pages
    for name in ("block_table", "seq_lens"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    assert second.seq_lens.tolist() == [5, 7] and backend.graph.seq_lens.tolist() == [5, 7, 1, 1]
    held.batch.forward_mode = EXTEND
    with pytest.raises(NotImplementedError, match="forward_mode: got EXTEND in a captured graph"):
        backend.init_forward_metadata_out_graph(held.batch)


class TestDraft:
    """SGLang's own loop of draft steps, over the backends that its factory makes."""

    @pytest.fixture(autouse=True)
    def _random_state(self, monkeypatch):
        for name in ("get_rng_state", "set_rng_state"):
            monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: None)

    @staticmethod
    def made(topk=1):
        runner = speculative_draft_runner
        sizes = {"hidden_size": 64, "max_context_len": 64, "device": "cuda"} | SIZES
        settings = runner.EagleDraftRunnerSettings(
            topk=topk, speculative_num_steps=4, speculative_num_draft_tokens=4, capture_batch_size=3, vocab_size=64,
            hidden_size=64, max_context_len=64, dtype=torch.bfloat16, device="cuda", atol=0.01, rtol=0.01,
        )  # fmt: skip
        adapter = runner.EagleDraftCudaGraphRunnerAdapter(
            build_fixture=kit.build_mla_attention_fixture,
            make_model_forward=runner._make_mla_model_forward,
            make_draft_inputs=runner._make_mla_draft_inputs,
            prepare_replay_state=runner._prepare_mla_draft_replay_state,
            make_forward_batch=runner._make_mla_eagle_draft_forward_batch,
            check_case=runner._check_mla_draft_cache_layout,
        )
        asked = case(DECODE, 1, (14, 15, 3))
        inputs = adapter.make_draft_inputs(asked, settings)
        fixture, worker, backend = runner._build_eagle_draft_fixture(
            unittest.TestCase(), asked, adapter=adapter, build_kwargs=sizes, settings=settings
        )
        adapter.prepare_replay_state(fixture, asked, inputs, settings)
        batch = adapter.make_forward_batch(asked, inputs, settings)
        fixture.runner.kv_index_translator.bind_own_plan(batch)
        return fixture, worker, backend, batch

    @pytest.mark.parametrize("in_graph", [False, True])
    @torch.no_grad()
    def test_each_step_sees_the_drafts_before_it(self, in_graph):
        fixture, worker, backend, batch = self.made()
        rows, pool = fixture.runner.req_to_token_pool.req_to_token, fixture.runner.token_to_kv_pool.kv_buffer[0]
        seen = []

        def judged(step, ours):
            def attend(q, layer, pages, return_lse):
                out = ours(q, layer, pages, return_lse)
                for query, got, row, prefix in zip(q.view(3, 4, -1), out.view(3, 4, -1), rows, (14, 15, 3)):
                    slots = row[: prefix + step + 1].long()
                    want, _ = plain(query[None], pool, slots, layer.scaling, SIZES["kv_lora_rank"])
                    seen.append(((got - want[0]).abs().max() / want.abs().max()).item())
                return out

            return attend

        for step, one in enumerate(backend.attn_backends):
            one._attend_pages = judged(step, one._attend_pages)
        if in_graph:
            backend.init_cuda_graph_state(max_bs=3, max_num_tokens=3)
            backend.init_forward_metadata_out_graph(batch, in_capture=True)
            backend.init_forward_metadata_out_graph(batch)
            backend.init_forward_metadata_in_graph(batch)
        else:
            backend.init_forward_metadata(batch)
        batch.mark_forward_metadata_ready()
        worker.draft_forward(batch)
        assert len(seen) == 9 and max(seen) < 0.01

    def test_a_tree_is_refused(self):
        with pytest.raises(NotImplementedError, match="--speculative-eagle-topk: got 2, 1 is accepted"):
            self.made(topk=2)


LAYER = {
    "logit_cap": 30.0,
    "sliding_window_size": 128,
    "is_cross_attention": True,
    "use_irope": True,
    "pos_encoding_mode": "ROPE_LLAMA",
    "xai_temperature_len": 10,
    "attn_type": "encoder_only",
    "tp_k_head_num": 2,
}


@pytest.mark.parametrize("name", LAYER)
def test_layers_that_attention_here_does_not_compute_are_refused(name):
    held = Held(case(DECODE, 64, (5,), (), 4), 4)
    setattr(held.layer, name, LAYER[name])
    if name == "tp_k_head_num":
        held.k = torch.cat([held.k, held.k], 1)
    with pytest.raises(NotImplementedError, match=name):
        held.attend()


def test_sinks_are_refused():
    """SGLang does not hand them to a backend that its own list has not."""
    with pytest.raises(NotImplementedError, match="learnable_sink_param"):
        sglang_attention.choose_form(SimpleNamespace(learnable_sink_param=torch.zeros(4)), None)


@pytest.mark.parametrize("name", ["topk_indices", "attn_sink", "q_rope"])
def test_arguments_that_attention_here_does_not_read_are_refused(name):
    held = Held(case(DECODE, 64, (5,), (), 4), 4)
    with pytest.raises(NotImplementedError, match=name):
        held.backend.forward_decode(held.q, held.k, held.k, held.layer, held.batch, **{name: torch.zeros(1)})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"use_mla_backend": False}, "--attention-backend"),
        ({"kv_cache_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype: got torch.float8_e4m3fn"),
        ({"dtype": torch.float16}, "--kv-cache-dtype: got torch.bfloat16 for a model in torch.float16"),
        ({"token_to_kv_pool": SimpleNamespace()}, "token_to_kv_pool: got SimpleNamespace"),
        ({"kv_index_translator": SimpleNamespace(is_translating=True)}, "--enable-unified-memory"),
    ],
)
def test_runners_that_are_not_supported_are_refused(changed, message):
    runner = Held(case(DECODE, 64, (5,), (), 4), 4).runner
    asked = SimpleNamespace(**vars(runner) | changed)
    with pytest.raises(NotImplementedError, match=message):
        ATTENTION_BACKENDS[NAME](asked)


OPTIONS = {
    "get_parallel": ("attn_dcp_size", "attn_cp_size"),
    "get_spec": ("speculative_algorithm", "speculative_eagle_topk", "speculative_draft_window_size"),
}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attn_dcp_size": 2}, "--dcp-size: got 2"),
        ({"attn_cp_size": 4}, "--attn-cp-size: got 4"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm: got NGRAM"),
        ({"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4}, "--speculative-eagle-topk: got 4"),
        (
            {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 1, "speculative_draft_window_size": 64},
            "--speculative-draft-window-size: got 64",
        ),
    ],
)
def test_options_that_are_not_supported_are_refused(options, message, monkeypatch):
    runner = Held(case(DECODE, 64, (5,), (), 4), 4).runner
    for space in ("get_parallel", "get_spec"):
        now = getattr(sglang_attention, space)()
        held = {name: getattr(now, name) for name in OPTIONS[space]}
        monkeypatch.setattr(sglang_attention, space, lambda held=held: SimpleNamespace(**held | options))
    with pytest.raises(NotImplementedError, match=message):
        ATTENTION_BACKENDS[NAME](runner)


def test_diffusion_is_refused(monkeypatch):
    """Its tokens see those behind them, too."""
    runner, now = Held(case(DECODE, 64, (5,), (), 4), 4).runner, sglang_attention.get_exec()
    asked = SimpleNamespace(deterministic=now.deterministic, dllm=SimpleNamespace(dllm_algorithm="LowConfidence"))
    monkeypatch.setattr(sglang_attention, "get_exec", lambda: asked)
    with pytest.raises(NotImplementedError, match="--dllm-algorithm: got LowConfidence, none is accepted"):
        ATTENTION_BACKENDS[NAME](runner)
