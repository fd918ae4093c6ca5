"""MTPLayer and V4MTPLayer against transformers' layers: forward, gradients, caches with drafts, published names."""

import pytest
import torch
from transformers import DeepseekV3Config, modeling_layers
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from mla_kernels import LatentCache, nn
from mla_kernels.reference.mtp import mtp_input, rms_norm, v4_mtp_input
from tests import published
from tests.compat.models import CACHE
from tests.support import assert_close
from tests.test_nn_v4 import KINDS
from tests.test_nn_v4 import config as v4_config

TOKENS, POSITIONS, EPS = 21, 64, 1e-5
JUDGES = ["decoder layer", *(["MtpLayer"] if hasattr(modeling_layers, "MtpLayer") else [])]


def fill(module):
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "inv_freq" not in name:
            tensor.data.normal_(0, 0.3 if tensor.dim() < 2 or "hc" in name else tensor.shape[-1] ** -0.5)
            if "norm" in name or name.endswith("scale"):
                tensor.data.add_(1.0)
    return module


def v3_config():
    return DeepseekV3Config(
        hidden_size=48, intermediate_size=64, moe_intermediate_size=16, num_attention_heads=3, num_key_value_heads=3,
        kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8,
        n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1, num_hidden_layers=2, vocab_size=64,
        first_k_dense_replace=1, max_position_embeddings=POSITIONS, rms_norm_eps=EPS, attn_implementation="eager",
    )  # fmt: skip


class V3:
    """transformers' layer of DeepSeek-V3 and ours with its weights."""

    def __init__(self):
        self.config = v3_config()
        self.block = fill(v3.DeepseekV3DecoderLayer(self.config, 1))
        size = self.config.hidden_size
        own = {"enorm.weight": 1 + 0.3 * torch.randn(size), "hnorm.weight": 1 + 0.3 * torch.randn(size)}
        own |= {"eh_proj.weight": torch.randn(size, 2 * size) * (2 * size) ** -0.5}
        own |= {"shared_head.norm.weight": 1 + 0.3 * torch.randn(size)}
        self.state = {**self.block.state_dict(), **own}
        self.tables = nn.rope_tables(16, POSITIONS, self.config.rope_parameters)
        self.inputs = torch.randn(2, TOKENS, size), torch.randn(2, TOKENS, size)

    def ours(self):
        layer = nn.MTPLayer.from_hf(self.config)
        layer.load_state_dict(dict(self.state))
        return layer

    def theirs(self, judge, embeds, hidden):
        place = torch.arange(embeds.shape[1])[None]
        angles = v3.DeepseekV3RotaryEmbedding(self.config)(embeds, place)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embeds, attention_mask=None, position_ids=place, **{CACHE: None}
        )
        options = {"position_embeddings": angles, "position_ids": place, CACHE: None}
        if judge == "MtpLayer":
            layer = modeling_layers.MtpLayer(self.config, v3.DeepseekV3DecoderLayer, v3.DeepseekV3RMSNorm, 1)
            own = ("enorm", "hnorm", "eh_proj", "shared_head")
            names = {name: name if name.startswith(own) else f"mtp_block.{name}" for name in self.state}
            layer.load_state_dict(
                {names[name].replace("shared_head.norm", "post_norm"): value for name, value in self.state.items()}
            )
            return layer(embeds, hidden, attention_mask=mask, **options)
        parts = [self.state[f"{name}.weight"] for name in ("enorm", "hnorm", "eh_proj")]
        x = self.block(mtp_input(embeds, hidden, *parts, EPS), attention_mask=mask, **options)
        x = x[0] if isinstance(x, tuple) else x
        return rms_norm(x, self.state["shared_head.norm.weight"], EPS)


class V4:
    """The same of DeepSeek-V4, which transformers has without what makes it predict."""

    def __init__(self):
        kinds = {"layer_types": [KINDS[0]] * 3, "mlp_layer_types": ["moe"] * 3, "swiglu_limit": 1.0}
        self.config = v4_config(hc_mult=2, rms_norm_eps=EPS, **kinds)
        self.block, size = fill(v4.DeepseekV4DecoderLayer(self.config, 0)), self.config.hidden_size
        self.head = fill(v4.DeepseekV4HyperHead(self.config))
        own = {f"{name}.weight": 1 + 0.3 * torch.randn(size) for name in ("enorm", "hnorm", "norm")}
        own |= {f"{name}.weight": torch.randn(size, size) * size**-0.5 for name in ("e_proj", "h_proj")}
        own |= {f"hc_head.{name}": value for name, value in self.head.state_dict().items()}
        self.state = {**self.block.state_dict(), **own}
        self.tables = nn.rope_tables(16, POSITIONS, self.config.rope_parameters["main"])
        self.inputs = torch.randn(2, TOKENS, size), torch.randn(2, TOKENS, 2, size)

    def ours(self):
        layer = nn.V4MTPLayer.from_hf(self.config)
        layer.load_state_dict(dict(self.state))
        return layer

    def theirs(self, embeds, streams):
        place = torch.arange(embeds.shape[1])[None]
        rotary = v4.DeepseekV4RotaryEmbedding(self.config)
        angles = {name: rotary(embeds, position_ids=place, layer_type=name) for name in ("main", "compress")}
        mask = create_sliding_window_causal_mask(
            config=self.config, inputs_embeds=embeds, attention_mask=None, position_ids=place, **{CACHE: None}
        )
        parts = [self.state[f"{name}.weight"] for name in ("enorm", "hnorm", "e_proj", "h_proj")]
        x = self.block(
            v4_mtp_input(embeds, streams, *parts, EPS), position_embeddings=angles, position_ids=place,
            attention_mask=mask, **{CACHE: None},
        )  # fmt: skip
        return rms_norm(self.head(x), self.state["norm.weight"], EPS), x


@pytest.mark.parametrize("judge", JUDGES)
def test_v3_forward_and_gradients(judge, cpu_code):
    layers = V3()
    ours, positions = layers.ours(), torch.arange(TOKENS).expand(2, -1)
    toward, grads = torch.randn(2, TOKENS, 48), []
    for call in (
        lambda *inputs: layers.theirs(judge, *inputs), lambda *inputs: ours(*inputs, *layers.tables, positions),
    ):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in layers.inputs]
        out = call(*leaves)
        out.backward(toward)
        grads.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for got, want in zip(grads[1], grads[0]):
        assert_close(got, want.double())


def test_v3_drafts_are_taken_back(cpu_code):
    """A prompt, then three tokens at a time, of which the first alone is right: a shorter length at the next call."""
    layers = V3()
    ours, cos_sin = layers.ours(), layers.tables
    with torch.no_grad():
        want = layers.theirs("decoder layer", *layers.inputs)
        cache = LatentCache.allocate(32, 4, latent_dim=32, rope_dim=16, dtype=torch.float32)
        table = torch.randperm(32, dtype=torch.int32).view(2, 16)

        def places(first, count):
            positions = torch.arange(first, first + count).expand(2, -1)
            return positions, table.long().gather(1, positions // 4) * 4 + positions % 4

        prompt = [x[:, :9] for x in layers.inputs]
        got = ours.prefill(*prompt, *cos_sin, *places(0, 9), cache)
        torch.testing.assert_close(got, want[:, :9], atol=2e-6, rtol=1e-5)
        for length in range(9, TOKENS):
            drafts = [torch.cat((x[:, length : length + 1], torch.randn(2, 2, 48)), 1) for x in layers.inputs]
            lengths = torch.full((2,), length + 3, dtype=torch.int32)
            got = ours.decode(*drafts, *cos_sin, *places(length, 3), cache, table, lengths)
            torch.testing.assert_close(got[:, 0], want[:, length], atol=2e-6, rtol=1e-5)


def test_v4_forward_and_gradients(cpu_code):
    layers = V4()
    ours = layers.ours()
    toward, grads = [torch.randn(2, TOKENS, 48), torch.randn(2, TOKENS, 2, 48)], []
    for call in (layers.theirs, lambda *inputs: ours(*inputs, *layers.tables)):
        leaves = [x.clone().requires_grad_() for x in layers.inputs]
        outs = call(*leaves)
        torch.autograd.backward(outs, toward)
        grads.append((*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)))
    for got, want in zip(grads[1], grads[0]):
        assert_close(got, want.double())


def test_v4_drafts_are_taken_back(cpu_code):
    layers = V4()
    ours, cos_sin = layers.ours(), layers.tables
    with torch.no_grad():
        want = layers.theirs(*layers.inputs)
        cache = nn.V4Cache.allocate(ours.self_attn.config, num_pages=32, page_size=4, dtype=torch.float32)
        table = torch.randperm(32, dtype=torch.int32).view(2, 16)
        prompt = [x[:, :9].flatten(0, 1) for x in layers.inputs]
        bounds = torch.tensor([0, 9, 18], dtype=torch.int32)

        def slots(first, count):
            positions = torch.arange(first, first + count).expand(2, -1)
            return table.gather(1, positions // 4) * 4 + positions % 4

        lengths = torch.full((2,), 9, dtype=torch.int32)
        got = ours.prefill(*prompt, *cos_sin, bounds, slots(0, 9).flatten(), cache, nn.V4Sequences(lengths, table))
        for mine, exact in zip(got, want):
            torch.testing.assert_close(mine.unflatten(0, (2, 9)), exact[:, :9], atol=5e-6, rtol=1e-5)
        for length in range(9, TOKENS):
            new = [x[:, length : length + 1] for x in layers.inputs]
            drafts = [torch.cat((x, torch.randn(2, 2, *x.shape[2:])), 1) for x in new]
            sequences = nn.V4Sequences(torch.full((2,), length + 3, dtype=torch.int32), table)
            got = ours.decode(*drafts, *cos_sin, slots(length, 3), cache, sequences)
            for mine, exact in zip(got, want):
                torch.testing.assert_close(mine[:, 0], exact[:, length], atol=5e-6, rtol=1e-5)


def by_expert(state, names):
    """The experts one by one under ``names``, as published files have them; the rest as it is."""
    file = {}
    for name, value in state.items():
        if name == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                file[f"mlp.experts.{expert}.{names[0]}.weight"] = gate
                file[f"mlp.experts.{expert}.{names[1]}.weight"] = up
        elif name == "mlp.experts.down_proj":
            file |= {f"mlp.experts.{expert}.{names[2]}.weight": one for expert, one in enumerate(value)}
        else:
            file[name] = value
    return file


def test_published_file_of_v3(cpu_code):
    """Below ``model.layers.61.``: experts and projections in e4m3 blocks, the model's embedding and head once more."""
    layers, file, true = V3(), {}, {}
    for name, value in by_expert(layers.state, ("gate_proj", "up_proj", "down_proj")).items():
        if value.dim() == 2 and name not in ("eh_proj.weight", "mlp.gate.weight"):
            stored, exact = published.fp8("w", value)
            file |= {name.removesuffix("weight") + key.removeprefix("w."): one for key, one in stored.items()}
        else:
            file[name] = exact = value
        true[name] = exact
    file |= {"embed_tokens.weight": torch.randn(64, 48), "shared_head.head.weight": torch.randn(64, 48)}
    ours = nn.MTPLayer.from_hf(layers.config)
    holder = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"61": ours})})
    holder.load_state_dict({f"layers.61.{name}": value for name, value in file.items()})
    exact = nn.MTPLayer.from_hf(layers.config)
    exact.load_state_dict({name: value.float() for name, value in true.items()})
    for (name, got), want in zip(ours.state_dict().items(), exact.state_dict().values()):
        assert torch.equal(got, want), name
    with pytest.raises(RuntimeError, match=r"Missing key.*eh_proj.weight"):
        ours.load_state_dict({name: x for name, x in file.items() if not name.startswith("eh_proj")})


V4_NAMES = {
    "self_attn.q_a_proj": "attn.wq_a", "self_attn.q_a_norm": "attn.q_norm", "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv", "self_attn.kv_norm": "attn.kv_norm", "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b", "self_attn.sinks": "attn.attn_sink", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "attn_hc.": "hc_attn_", "ffn_hc.": "hc_ffn_", "hc_head.hc_": "hc_head_",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1", "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3", "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.": "ffn.",
}  # fmt: skip


def test_published_file_of_v4(cpu_code):
    """Below ``mtp.0.``: projections and experts in e4m3 with ue8m0 scales."""
    layers, file, true = V4(), {}, {}
    for name, value in by_expert(layers.state, ("w1", "w3", "w2")).items():
        theirs = name
        for ours_begins, begins in V4_NAMES.items():
            if name.startswith(ours_begins):
                theirs = begins + name.removeprefix(ours_begins)
                break
        if value.dim() == 2 and "hc" not in name and name != "mlp.gate.weight":
            stored, exact = published.v4_fp8("w", value)
            file |= {theirs.removesuffix("weight") + key.removeprefix("w."): one for key, one in stored.items()}
        else:
            file[theirs] = exact = value
        true[name] = exact.float() if exact.is_floating_point() else exact
    assert {"e_proj.scale", "h_proj.scale", "hc_head_fn", "hc_attn_base", "attn.wq_a.scale", "norm.weight"} <= {*file}
    assert {"ffn.gate.bias", "ffn.experts.3.w2.scale", "ffn.shared_experts.w1.weight", "attn_norm.weight"} <= {*file}
    ours, exact = nn.V4MTPLayer.from_hf(layers.config), nn.V4MTPLayer.from_hf(layers.config)
    holder = torch.nn.ModuleDict({"mtp": torch.nn.ModuleDict({"0": ours})})
    holder.load_state_dict({f"mtp.0.{name}": value for name, value in file.items()})
    exact.load_state_dict(true)
    for (name, got), want in zip(ours.state_dict().items(), exact.state_dict().values()):
        assert torch.equal(got, want), name
    other = {name: value for name, value in file.items() if not name.startswith(("enorm", "hnorm"))}
    with pytest.raises(RuntimeError, match=r"Missing key.*enorm.weight.*hnorm.weight"):
        ours.load_state_dict(other)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: nn.MTPLayer.from_hf(v4_config()), ValueError, "config.model_type: got 'deepseek_v4', accepted"),
        (lambda: nn.V4MTPLayer.from_hf(v3_config()), ValueError, "config.model_type: got 'deepseek_v3', accepted"),
        (lambda: V4().ours()(torch.randn(1, 3, 48), torch.randn(1, 3, 3, 48), *V4().tables), ValueError,
         r"streams: got shape \(1, 3, 3, 48\)"),
        (lambda: V3().ours()(torch.randn(1, 3, 48), torch.randn(1, 4, 48), *V3().tables, torch.zeros(1, 3).long()),
         ValueError, r"hidden: got shape \(1, 4, 48\)"),
    ],
)  # fmt: skip
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
