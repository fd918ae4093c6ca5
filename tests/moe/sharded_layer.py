"""What a rank does in the tests of nn.MoE over several ranks: in a file that is quick to import."""

import torch
import torch.distributed as dist

from mla_kernels.moe.parallel.expert_parallel import ExpertParallel
from mla_kernels.nn import MoE

EXPERTS_PER_RANK = (3, 5)


def train_sharded(rank, size, config, state, hidden, ids, grad, tokens_of, chunks):
    """This rank's outputs, and gradients of its hidden states, experts (the shared ones summed) and router (summed)."""
    parallel = ExpertParallel(config.num_experts, experts_per_rank=EXPERTS_PER_RANK, timeout=90)
    moe = MoE(config, parallel=parallel, chunks=chunks)
    moe.load_state_dict(state)
    own = slice(sum(tokens_of[:rank]), sum(tokens_of[: rank + 1]))
    hidden = hidden[own].clone().requires_grad_()
    out = moe(hidden, *(x[own] for x in ids))
    out.backward(grad[own])
    for parameter in moe.gate.parameters():
        dist.all_reduce(parameter.grad)
    gradients = [x.grad for x in (moe.experts.gate_up_proj, moe.experts.down_proj)]
    for gradient in gradients:  # every rank has a copy of the shared experts
        dist.all_reduce(gradient[parallel.num_local :])
    assert moe.state_dict()["experts.gate_up_proj"].shape[0] == parallel.num_local
    moe.load_state_dict(moe.state_dict())
    return out.detach(), hidden.grad, *gradients, moe.gate.weight.grad


def infer_quantised(rank, size, config, state, hidden, format):
    """This rank's outputs with its experts in another format."""
    moe = MoE(config, parallel=ExpertParallel(config.num_experts, experts_per_rank=EXPERTS_PER_RANK, timeout=90))
    moe.load_state_dict(state)
    with torch.no_grad():
        return moe.to_quantized(format)(hidden.tensor_split(size)[rank])


def load_codes(rank, size, config, state, hidden, options):
    """This rank's experts from a file of codes, whose e4m3 comes as bytes, in float32, and its outputs."""
    parallel = ExpertParallel(config.num_experts, experts_per_rank=EXPERTS_PER_RANK, timeout=90)
    moe = MoE(config, parallel=parallel, **options)
    e4m3 = {key: value.view(torch.float8_e4m3fn) for key, value in state.items() if value.dtype == torch.uint8}
    moe.load_state_dict(state | e4m3)
    parts = []
    for experts in (moe.experts, moe.shared_experts) if moe.shared_apart else (moe.experts,):
        plain = not hasattr(experts, "weights")
        parts.append((experts.gate_up_proj, experts.down_proj) if plain else experts.weights.dequantise())
    with torch.no_grad():
        out = moe(hidden.tensor_split(size)[rank])
    return *(torch.cat(both).detach() for both in zip(*parts)), out
