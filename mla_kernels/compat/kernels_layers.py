"""Layers under the names by which transformers looks for mixture-of-experts kernels in Hugging Face's ``kernels``.

A layer of ``kernels`` has no state and no method but ``forward``, which takes the place of that of a model's own layer:
``self`` is the model's layer, with its parameters.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.compat.transformers_experts import experts, why_not_fused
from mla_kernels.moe.route.route import route

__all__ = ["MegaBlocksMoeMLP", "SoftmaxTopKRouter", "why_not_served"]


class MegaBlocksMoeMLP(nn.Module):
    """GPT-OSS's experts and their router: ``route`` and ``fused_moe``, forward and backward.

    ``forward(hidden_states [batch, tokens, hidden])`` gives (the same shape, weights [batch * tokens, top_k]), as
    GptOssMLP does. Raises NotImplementedError for experts without plain weights (GPT-OSS's own mxfp4, bitsandbytes).

    Source: transformers' GptOssMLP.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states):
        if reason := why_not_served(self):
            raise NotImplementedError(f"MegaBlocksMoeMLP of mla_kernels: {type(self).__name__}: {reason}")
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        router = self.router
        logits = F.linear(rows, router.weight, router.bias)
        weights, ids = route(logits, router.top_k, scoring="softmax")  # of the chosen alone, once renormalised
        out = experts(self.experts, rows, ids, weights)
        return out.view_as(hidden_states), weights.to(logits.dtype)


class SoftmaxTopKRouter(nn.Module):
    """The routers of Qwen3.5-MoE (softmax) and of Laguna, which has the same name and sigmoid, a bias and a soft cap.

    ``forward(hidden_states [.., hidden])`` gives (logits [tokens, experts], weights [tokens, top_k], ids [tokens,
    top_k] int64), each in the dtype of the model's own. Of equal scores the expert with the lowest number is chosen.

    Source: transformers' Qwen3_5MoeTopKRouter and LagunaTopKRouter.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states):
        rows = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(rows, self.weight)
        bias = getattr(self, "e_score_correction_bias", None)
        if bias is None:
            weights, ids = route(logits, self.top_k, scoring="softmax")
            return logits, weights.to(logits.dtype), ids.long()
        logits = logits.float()
        if self.router_logit_softcapping > 0.0:
            logits = torch.tanh(logits / self.router_logit_softcapping) * self.router_logit_softcapping
        weights, ids = route(logits, self.top_k, bias=bias.detach().float())
        return logits, weights.to(rows.dtype), ids.long()


def why_not_served(module: nn.Module) -> str | None:
    """Why a layer of this module's name does not compute what the module does; None if it does."""
    if not hasattr(module, "experts"):
        return None
    for inner in (module.experts, module.router):  # of expert parallelism, adapters, offloading
        if inner._forward_hooks or inner._forward_pre_hooks or getattr(inner, "_is_hooked", False):
            return f"hooks on {type(inner).__name__}, which would not run"
    return why_not_fused(module.experts)
