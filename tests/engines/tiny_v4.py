"""A small DeepSeek-V4 in vLLM's own code for CUDA, on CPU tensors; as :mod:`tests.engines.tiny` for the others."""

import tempfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.engines import tiny

LENGTHS, WINDOW, TOP_K = (280, 90, 290), 32, 16
CACHED = (0, 0, 256)
"""Of three prompts: the third begins with the first's 256 tokens, and finds them cached in the first's pages."""
V4 = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": 256,
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "compressed_sparse_attention",
    "heavily_compressed_attention"], "mlp_layer_types": ["hash_moe"] * 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 64, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "vocab_size": 512, "max_position_embeddings": tiny.WIDEST, "sliding_window": WINDOW,
    "index_n_heads": 4, "index_head_dim": 128, "index_topk": TOP_K, "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6, "hc_mult": 4, "swiglu_limit": 10.0, "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc", "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
    "rope_parameters": {"rope_type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1,
                        "original_max_position_embeddings": 128},
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip


def judge():
    """transformers' model in float32, of weights that bfloat16 holds, and the same weights by DeepSeek's names."""
    import transformers

    given = {key: V4[key] for key in {*V4} - {"architectures", "model_type", "torch_dtype", "topk_method"}}
    config = transformers.DeepseekV4Config(**given, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith(("base", "sinks")):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("scale"):
            torch.nn.init.ones_(parameter)
        parameter.data = parameter.bfloat16().float()
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.randint(0, V4["n_routed_experts"], buffer.shape))
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    weights = load_file(f"{folder}/model.safetensors")
    names = {name: name.replace(".attn.norm.", ".attn.kv_norm.").replace("hc_head.hc_", "hc_head_") for name in weights}
    return model.eval(), {names[name]: weight for name, weight in weights.items()}


def prompts() -> list[list[int]]:
    """Three prompts of these lengths."""
    torch.manual_seed(1)
    first, second, third = (torch.randint(0, V4["vocab_size"], (length,)).tolist() for length in LENGTHS)
    return [first, second, first[: CACHED[2]] + third[CACHED[2] :]]


class Engine(tiny.Engine):
    """vLLM's model with the builders of its four kinds of caches, each with a block table of its own."""

    block = 256

    def _load(self, weights):
        if weights is None:
            return self._make()

        def plain(self, hidden, input_ids):
            """The experts, which are not this library's business here, by torch."""
            gate, experts = self.gate, self.experts.routed_experts
            scores = F.softplus(F.linear(hidden.float(), gate.weight.float())).sqrt()
            chosen = gate.tid2eid[input_ids].long()  # by the token: no two experts that bfloat16 could mix up
            weights = scores.gather(1, chosen)
            weights = weights / weights.sum(1, keepdim=True) * self.routed_scaling_factor
            limit, out = self.swiglu_limit, torch.zeros_like(hidden, dtype=torch.float32)
            for column in range(chosen.shape[1]):
                w13, w2 = experts.w13_weight[chosen[:, column]].float(), experts.w2_weight[chosen[:, column]].float()
                gate_up = torch.einsum("th,tih->ti", hidden.float(), w13)
                left, right = gate_up.chunk(2, 1)
                mid = F.silu(left.clamp(max=limit)) * right.clamp(-limit, limit)
                out += torch.einsum("ti,thi->th", mid, w2) * weights[:, column, None]
            return (out + self.shared_experts(hidden).float()).to(hidden.dtype)

        from vllm.models.deepseek_v4.nvidia.model import DeepseekV4MoE

        DeepseekV4MoE._forward_fused_moe = plain
        model = super()._load(weights)
        for layer in model.model.layers:
            layer.attn.wo_a.quant_method.process_weights_after_loading(layer.attn.wo_a)
            layer.attn.aux_stream_list = None
            if layer.attn.indexer is not None:
                layer.attn.indexer.aux_stream = None
        return model

    def _builder(self, name, layer):
        spec = layer.get_kv_cache_spec(self.config) if hasattr(layer, "get_kv_cache_spec") else None
        if spec is None:  # experts, and attention to the window alone
            return None
        pages = len(LENGTHS) * -(-tiny.WIDEST // spec.block_size)
        data = torch.full((pages, spec.page_size_bytes), 0xFF, dtype=torch.uint8).view(spec.dtype)
        width = spec.state_content_size_bytes // spec.dtype.itemsize
        shape = (pages, 1, spec.num_states, width)
        layer.bind_kv_cache(data.as_strided(shape, (data.stride(0), data.stride(0), width, 1)))
        return self._made(layer.get_attn_backend(), spec, name)

    def _pages(self, request, block):
        """Each of a request's pages, of no order."""
        torch.manual_seed(block)
        count = -(-tiny.WIDEST // block)
        pages = torch.randperm(len(LENGTHS) * count).view(len(LENGTHS), count)
        pages[2, : CACHED[2] // block] = pages[0, : CACHED[2] // block]
        return pages[request]

    def metadata(self, requests):
        made, slots = {}, {}
        for name, builder in self.builders.items():
            block = builder.kv_cache_spec.block_size
            tables = [(self._pages(request, block), tokens, context) for request, tokens, context in requests]
            common, positions, slots[name] = self.common(tables, block)
            made[name] = builder.build(0, common)
        return made, positions, slots


def serve(engine, prompts, schedule):
    """As :func:`tests.engines.tiny.serve`: a list of (logits [tokens, vocabulary], picks [tokens, TOP_K])."""
    done, logits, picks = list(CACHED), [[] for _ in prompts], [[] for _ in prompts]
    for step in schedule:
        out = engine.step([(p, prompts[p][done[p] : done[p] + n], done[p]) for p, n in step])
        sizes = [n for _, n in step]
        chosen = engine.model.model.topk_indices_buffer[: sum(sizes)].clone()
        for (p, n), part, found in zip(step, out.split(sizes), chosen.split(sizes)):
            logits[p].append(part)
            picks[p].append(found)
            done[p] += n
    assert done == [len(prompt) for prompt in prompts]
    return [(torch.cat(parts), torch.cat(found)) for parts, found in zip(logits, picks)]
