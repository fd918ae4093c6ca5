"""A small DeepSeek-V3 in SGLang's own model runner, on CPU tensors, driven step by step as its scheduler would.

SGLang keeps one configuration and one process group a process: ``python -m tests.engines_sglang.tiny FOLDER OUT
[options of SGLang]`` loads the model of a folder with SGLang's own loader, serves :func:`prompts` as :data:`STEPS` says
and saves, of each prompt, logits [tokens, vocabulary] and the experts of each layer that has some.
"""

import json
import sys
from array import array
from pathlib import Path

import torch

from tests.engines_sglang.pretended import pretend  # before anything that loads Triton

PAGES = 64  # the third prompt finds so many tokens of the first one cached
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128, "n_group": 2, "topk_group": 1,
    "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
OF_THE_CHECKPOINT = {"moe_layer_freq": 1, "num_nextn_predict_layers": 0, "topk_method": "noaux_tc",
                     "scoring_func": "sigmoid", "ep_size": 1, "rope_theta": 10000.0}  # fmt: skip
"""What DeepSeek's own configuration has and transformers' does not write."""

CACHED = (0, 0, PAGES, 0, 0, 0)
STEPS = [
    ([(0, 100)], False),
    ([(1, 33)], False),
    ([(1, 27)], True),
    ([(2, 40)], True),
    *[([], True)] * 3,
    ([(5, 150)], False),
    ([(3, 61), (4, 17), (5, 250)], False),
    *[([], True)] * 2,
]
"""Steps of ([(prompt, new tokens)], whether those that were read wholly decode one more): whole prompts, chunks over a
prefix, shorter than what makes expanded heads pay and longer, prompts beside decoding, decoding alone."""
READ = {0: 100, 1: 60, 2: 104, 3: 61, 4: 17, 5: 400}
"""Tokens of each prompt that are read before it decodes."""


def prompts() -> list[list[int]]:
    """Six prompts; the third begins with the first's first 64 tokens."""
    torch.manual_seed(1)
    drawn = [torch.randint(0, SHAPE["vocab_size"], (length,)).tolist() for length in (150, 90, 140, 80, 40, 420)]
    drawn[2][:PAGES] = drawn[0][:PAGES]
    return drawn


def judge(folder: Path):
    """transformers' model in float32, of weights that bfloat16 holds, saved to ``folder`` as SGLang loads it."""
    import transformers

    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SHAPE, attn_implementation="eager"))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.bfloat16().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OF_THE_CHECKPOINT))
    return model.float().eval()


def quantise_experts(model, folder: Path, into: Path) -> None:
    """Write the checkpoint of ``folder`` to ``into``, its routed experts in fp8 with scales of 128 x 128 blocks, and
    put what these hold into the judge's weights."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["self_attn", "shared_experts", "layers.0.mlp", "lm_head"],
    }  # fmt: skip
    (into / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if ".mlp.experts." in name]:
        weight = weights[name].float()
        rows, columns = (size // 128 for size in weight.shape)
        blocks = weight.view(rows, 128, columns, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name] = codes.view(weight.shape)
        weights[name + "_scale_inv"] = scale
        held = (codes.float() * scale[:, None, :, None]).view(weight.shape)
        layer, expert, part = int(name.split(".")[2]), int(name.split(".")[5]), name.split(".")[6]
        experts = model.model.layers[layer].mlp.experts
        if part == "down_proj":
            experts.down_proj.data[expert] = held
        else:
            experts.gate_up_proj.data[expert].chunk(2)[part == "up_proj"].copy_(held)
    save_file(weights, into / "model.safetensors", {"format": "pt"})


class Engine:
    """SGLang's model runner, its pools and attention backend: what its scheduler drives."""

    def __init__(self, folder: str, *options: str):
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.benchmark import one_batch
        from sglang.srt.distributed import bootstrap
        from sglang.srt.layers.attention import merge_state
        from sglang.srt.layers.moe import topk
        from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
        from sglang.srt.platforms.cuda import CudaDeviceMixin
        from sglang.srt.runtime_context import get_device
        from sglang.srt.server_args import PortArgs, prepare_server_args

        from mla_kernels.compat.sglang import merge_state_v2

        CudaDeviceMixin.get_torch_distributed_backend_str = lambda platform: "gloo"
        # functions of CUDA, and a method that the choice of SGLang's reference forms would pass over
        merge_state.merge_state_v2 = merge_state_v2
        topk.biased_grouped_topk = self._route
        UnquantizedFusedMoEMethod.forward_native = UnquantizedFusedMoEMethod.forward_cuda
        self.sglang = one_batch
        arguments = prepare_server_args([
            "--model-path", folder, "--skip-tokenizer-init", "--dtype", "bfloat16", "--max-total-tokens", "4096",
            "--max-running-requests", "8", "--cuda-graph-backend-decode", "disabled",
            "--cuda-graph-backend-prefill", "disabled", *options,
        ])  # fmt: skip
        one_batch.publish(arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0))
        one_batch._init_process_global_configs()
        config, ports = one_batch.ModelConfig.from_server_args(arguments), PortArgs.init_new(arguments)
        bootstrap.init_parallel_runtime(
            server_args=arguments, device=get_device().device, dist_port=ports.nccl_port
        )  # fmt: skip
        bootstrap.init_layer_runtime(model_config=config)
        self.runner = one_batch.ModelRunner(
            model_config=config, mem_fraction_static=0.5, gpu_id=0, nccl_port=ports.nccl_port, server_args=arguments
        )
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self.runner.init_cuda_graphs()
        for cache in self.runner.token_to_kv_pool.kv_buffer:
            cache.fill_(torch.nan)
        self.runner.model.model.register_forward_hook(self._keep)
        self.requests, self.running = {}, None

    def _keep(self, module, inputs, hidden):
        self.hidden = hidden

    def _route(self, *args, **kwargs):
        from mla_kernels.compat.sglang import biased_grouped_topk

        weights, ids = biased_grouped_topk(*args, **kwargs)
        self.chosen.append(ids[:, : SHAPE["num_experts_per_tok"]].long())
        return weights, ids

    def request(self, number: int, tokens: list[int]):
        """SGLang's request; of the cached tokens it knows the slots by its tree of prefixes."""
        made = self.sglang.Req(
            rid=number, origin_input_text="", origin_input_ids=array("q", tokens),
            sampling_params=self.sglang.SamplingParams(temperature=0, max_new_tokens=100),
        )  # fmt: skip
        made.full_untruncated_fill_ids, made.logprob_start_len = made.origin_input_ids, -1
        self.requests[number] = made
        return made

    def tree(self):
        pool = self.runner.req_to_token_pool.req_to_token
        return self.sglang.TreeCacheNamespace(
            page_size=self.runner.page_size,
            device=self.runner.device,
            token_to_kv_pool_allocator=self.runner.token_to_kv_pool_allocator,
            prefix_device_indices=lambda req: pool[self.requests[0].kv.req_pool_idx][: req.prefix_len].long(),
        )

    def batch(self, requests):
        """A batch that reads prompts."""
        batch = self.sglang.ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=self.runner.req_to_token_pool,
            token_to_kv_pool_allocator=self.runner.token_to_kv_pool_allocator,
            tree_cache=self.tree(),
            model_config=self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=self.sglang.SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        batch.input_ids = batch.prefill_input_ids_cpu.clone()
        batch.prefill_input_ids_cpu = None
        return batch

    @torch.no_grad()
    def run(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [tokens, vocabulary], experts [layers, tokens, top_k])."""
        self.chosen = []
        forward_batch = self.sglang.ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)
        self.runner.forward(forward_batch)
        logits = self.hidden.float() @ self.runner.model.lm_head.weight.float().T
        return logits, torch.stack(self.chosen)


def serve(engine: Engine, texts: list[list[int]], steps) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run the prompts as ``steps`` says; what :meth:`Engine.run` gives of the tokens that were run, of each."""
    done = {number: CACHED[number] for number in range(len(texts))}
    parts: dict[int, list] = {number: [] for number in done}
    for extends, decodes in steps:
        batch, running, counts = None, engine.running, []
        if decodes and running is not None:
            running.input_ids = torch.tensor([texts[r.rid][done[r.rid]] for r in running.reqs])
            for request in running.reqs:
                request.output_ids.append(texts[request.rid][done[request.rid]])
            running.prepare_for_decode()
        if extends:
            for number, count in extends:
                request = engine.requests.get(number) or engine.request(number, texts[number][: READ[number]])
                request.prefix_len, request.extend_end = done[number], done[number] + count
            counts = list(extends)
            batch = engine.batch([engine.requests[number] for number, _ in extends])
        if decodes and running is not None:
            counts += [(request.rid, 1) for request in running.reqs]
            if batch is not None:
                ids = torch.cat([batch.input_ids, running.input_ids])
                batch.mix_with_running(running)
                batch.input_ids = ids
        logits, chosen = engine.run(batch or running)
        sizes = [count for _, count in counts]
        for (number, count), *part in zip(counts, logits.split(sizes), chosen.split(sizes, 1), strict=True):
            parts[number].append(part)
            done[number] += count
        if batch is not None and all(done[number] >= READ[number] for number, _ in extends):
            if running is None or (decodes and extends):
                engine.running = batch  # mixed with those that ran
            else:
                running.merge_batch(batch)
    return [
        (torch.cat([logits for logits, _ in part]), torch.cat([chosen for _, chosen in part], 1))
        for part in parts.values()
    ]


def main() -> None:
    folder, out, *options = sys.argv[1:]
    pretend(8, 0)
    engine = Engine(folder, *options)
    served = serve(engine, prompts(), STEPS)
    layers = [module for module in engine.runner.model.modules() if type(module).__name__ == "FusedMoE"]
    experts = sorted({layer.quant_method.runner.fused_func.__module__ for layer in layers})
    torch.save({"served": served, "backend": type(engine.runner.attn_backend).__name__, "experts": experts}, out)


if __name__ == "__main__":
    main()
