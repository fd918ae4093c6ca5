"""Layers of multi-token prediction (MTP): what DeepSeek-V3 and V4 draft tokens with.

Symbols: H hidden size, N streams.
"""

from dataclasses import replace

import torch
from torch import nn

from mla_kernels.checks import check_choice, check_tensor
from mla_kernels.nn.attention import LatentAttention
from mla_kernels.nn.hyper import HyperConnection, HyperHead
from mla_kernels.nn.layers import AttentionConfig, RMSNorm, project
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.moe import MoE
from mla_kernels.nn.moe_config import MoEConfig
from mla_kernels.nn.precision import Float32RMSNorm
from mla_kernels.nn.v4_attention import V4Attention
from mla_kernels.nn.v4_config import SLIDING, V4AttentionConfig


def _projection(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.register_load_state_dict_pre_hook(dequantise_state)
    return linear


class MTPLayer(nn.Module):
    """DeepSeek-V3's: a decoder layer over the next tokens' embeddings and the hidden states that they come after.

        x = eh_proj [enorm(embeds), hnorm(hidden)]
        x = x + self_attn(input_layernorm(x));  x = x + mlp(post_attention_layernorm(x))
        result = shared_head.norm(x)

    At position p stand the embedding of token p + 1 and the model's last hidden state at p, or the result of the MTP
    layer before. The model's own output head makes logits of token p + 2 from the result. The methods are those of
    :class:`LatentAttention`, with both inputs in place of its ``hidden``: :meth:`forward` over whole sequences, which
    is differentiable, :meth:`prefill` and :meth:`decode` over a cache of the layer's own. Draft tokens that were not
    accepted are taken back by shorter ``seq_lens`` at the next call.

    ``load_state_dict`` takes the tensors of a published file below ``model.layers.61.``, codes and their scales
    included; the embedding and the output head, which are the model's, are left out of them.

    Args:
        attention: sizes of the attention. experts: sizes of the mixture.
        eps: of the norms outside the attention.
        options: of :class:`MoE`, as ``expert_format="fp8_block"``.

    Source: DeepSeek-V3 technical report, https://arxiv.org/abs/2412.19437, section 2.2; Hugging Face ``MtpLayer``.
    """

    def __init__(self, attention: AttentionConfig, experts: MoEConfig, *, eps: float = 1e-6, **options):
        super().__init__()
        size = attention.hidden_size
        self.enorm, self.hnorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.eh_proj = _projection(2 * size, size)
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = LatentAttention(attention)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MoE(experts, **options)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(size, eps)})
        self.register_load_state_dict_pre_hook(_leave_out_shared)

    @classmethod
    def from_hf(cls, config, **options) -> "MTPLayer":
        """Of a configuration whose ``model_type`` is "deepseek_v3" or "kimi_k2".

        Raises:
            ValueError: another ``model_type``.
        """
        check_choice("config.model_type", config.model_type, ("deepseek_v3", "kimi_k2"))
        return cls(AttentionConfig.from_hf(config), MoEConfig.from_hf(config), eps=config.rms_norm_eps, **options)

    def _run(self, embeds, hidden, attend) -> torch.Tensor:
        check_tensor("embeds", embeds, shape=(*(None,) * (hidden.dim() - 1), self.self_attn.config.hidden_size))
        check_tensor("hidden", hidden, shape=tuple(embeds.shape), like=embeds)
        x = project(self.eh_proj, torch.cat((self.enorm(embeds), self.hnorm(hidden)), -1))
        x = x + attend(self.input_layernorm(x))
        return self.shared_head["norm"](x + self.mlp(self.post_attention_layernorm(x)))

    def forward(self, embeds: torch.Tensor, hidden: torch.Tensor, cos, sin, *places, **options) -> torch.Tensor:
        """embeds, hidden [..., H] to the same shape; the rest as :meth:`LatentAttention.forward` takes it."""
        return self._run(embeds, hidden, lambda x: self.self_attn(x, cos, sin, *places, **options))

    def prefill(self, embeds: torch.Tensor, hidden: torch.Tensor, cos, sin, *places, **options) -> torch.Tensor:
        """The same over a cache, as :meth:`LatentAttention.prefill`."""
        return self._run(embeds, hidden, lambda x: self.self_attn.prefill(x, cos, sin, *places, **options))

    def decode(self, embeds: torch.Tensor, hidden: torch.Tensor, cos, sin, *places, **options) -> torch.Tensor:
        """The same for the newest tokens of each sequence, as :meth:`LatentAttention.decode`."""
        return self._run(embeds, hidden, lambda x: self.self_attn.decode(x, cos, sin, *places, **options))


class V4MTPLayer(nn.Module):
    """DeepSeek-V4's: a decoder layer with a window alone, over N residual streams.

        streams = e_proj enorm(embeds) + h_proj hnorm(streams), the former for every stream
        attention and experts, each between its hyper-connection
        result = norm(hc_head(streams))

    Inputs, results and methods as of :class:`MTPLayer`, but that ``streams`` [..., N, H] are those behind the model's
    last layer, before its head, and that two things are returned: the result [..., H] for the model's output head, and
    the streams [..., N, H] for another such layer. The attention is :class:`V4Attention`'s, of layer type
    "sliding_attention", and so are the caches.

    ``load_state_dict`` takes the tensors of a published file below ``mtp.0.``, codes and their scales included; files
    whose ``mtp`` layers are others (without ``enorm``) lack names, which is refused.

    Args:
        attention: sizes, of layer type "sliding_attention". experts: sizes of the mixture.
        connection: of the streams, as :meth:`HyperConnection.from_hf` makes it, twice; head: of :class:`HyperHead`.
        options: of :class:`MoE`, as ``expert_format="mxfp4", shared_format="fp8_block"``.

    Source: ``MTPBlock`` of DeepSeek's inference code beside DeepSeek-V4-Flash.
    """

    def __init__(
        self,
        attention: V4AttentionConfig,
        experts: MoEConfig,
        connections: tuple[HyperConnection, HyperConnection],
        head: HyperHead,
        **options,
    ):
        super().__init__()
        check_choice("attention.layer_type", attention.layer_type, (SLIDING,))
        size, eps = attention.hidden_size, attention.eps
        self.enorm, self.hnorm = Float32RMSNorm(size, eps), Float32RMSNorm(size, eps)
        self.e_proj, self.h_proj = _projection(size, size), _projection(size, size)
        self.attn_hc, self.ffn_hc = connections
        self.input_layernorm = Float32RMSNorm(size, eps)
        self.self_attn = V4Attention(attention)
        self.post_attention_layernorm = Float32RMSNorm(size, eps)
        self.mlp = MoE(experts, **options)
        self.hc_head = head
        self.norm = Float32RMSNorm(size, eps)
        self.register_load_state_dict_pre_hook(_take_published)

    @classmethod
    def from_hf(cls, config, **options) -> "V4MTPLayer":
        """Of a configuration whose ``model_type`` is "deepseek_v4".

        Raises:
            ValueError: another ``model_type``.
        """
        attention = replace(V4AttentionConfig.from_hf(config, 0), layer_type=SLIDING, ratio=0)
        experts = replace(MoEConfig.from_hf(config, 0), hash_vocabulary=None)
        connections = HyperConnection.from_hf(config), HyperConnection.from_hf(config)
        return cls(attention, experts, connections, HyperHead.from_hf(config), **options)

    def _run(self, embeds, streams, attend) -> tuple[torch.Tensor, torch.Tensor]:
        check_tensor("embeds", embeds, shape=(*(None,) * (streams.dim() - 2), self.norm.weight.shape[0]))
        shape = (*embeds.shape[:-1], self.attn_hc.num_streams, embeds.shape[-1])
        check_tensor("streams", streams, shape=shape, like=embeds)
        streams = project(self.e_proj, self.enorm(embeds)).unsqueeze(-2) + project(self.h_proj, self.hnorm(streams))
        collapsed, post, comb = self.attn_hc(streams, norm_weight=self.input_layernorm.weight)
        out, weight = attend(collapsed), self.post_attention_layernorm.weight
        streams, collapsed, post, comb = self.ffn_hc.step(streams, out, post, comb, weight)
        streams = self.ffn_hc.write(streams, self.mlp(collapsed), post, comb)
        return self.hc_head(streams, norm_weight=self.norm.weight), streams

    def forward(self, embeds: torch.Tensor, streams: torch.Tensor, cos, sin, *places, **options):
        """embeds [..., H], streams [..., N, H]; the rest as :meth:`V4Attention.forward` takes it."""
        return self._run(embeds, streams, lambda x: self.self_attn(x, cos, sin, *places, **options))

    def prefill(self, embeds: torch.Tensor, streams: torch.Tensor, cos, sin, *places, **options):
        """The same over a cache, as :meth:`V4Attention.prefill`."""
        return self._run(embeds, streams, lambda x: self.self_attn.prefill(x, cos, sin, *places, **options))

    def decode(self, embeds: torch.Tensor, streams: torch.Tensor, cos, sin, *places, **options):
        """The same for the newest tokens of each sequence, as :meth:`V4Attention.decode`."""
        return self._run(embeds, streams, lambda x: self.self_attn.decode(x, cos, sin, *places, **options))


def _leave_out_shared(module: MTPLayer, state_dict: dict, prefix: str, *_) -> None:
    """Before ``load_state_dict``: the model's embedding and output head, which V3's files hold twice, go."""
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        state_dict.pop(prefix + name, None)


_PUBLISHED = {
    "attn.": "self_attn.", "ffn.": "mlp.", "attn_norm.": "input_layernorm.", "ffn_norm.": "post_attention_layernorm.",
    "hc_attn_": "attn_hc.", "hc_ffn_": "ffn_hc.", "hc_head_": "hc_head.hc_",
}  # fmt: skip
"""How DeepSeek's names begin, and these modules'."""


def _take_published(module: V4MTPLayer, state_dict: dict, prefix: str, *_) -> None:
    """Before ``load_state_dict``: DeepSeek's names become these modules'."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        for theirs, ours in _PUBLISHED.items():
            if own.startswith(theirs):
                state_dict[f"{prefix}{ours}{own.removeprefix(theirs)}"] = state_dict.pop(name)
                break
