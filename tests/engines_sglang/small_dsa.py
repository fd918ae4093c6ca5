"""A small DeepSeek-V3.2 or GLM-5 in SGLang's own ModelRunner for CUDA, on CPU tensors, driven as its scheduler would.

SGLang keeps one configuration and one process group a process: a later :class:`Engine` takes the place of the earlier.
"""

import json
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from tests.engines.tiny import CACHED, PAGES_OF, SHAPE, TOP_K, judge, prompts

__all__ = ["CACHED", "GLM", "TOP_K", "V32", "Engine", "judge", "on_cpu", "prompts", "resolved", "serve"]

PAGE, WIDEST, TOKENS = 64, 512, 2048
PUBLISHED = {
    "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "hidden_act": "silu", "ep_size": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
INDEXER = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": TOP_K}  # SGLang pads fewer heads, in float8
V32 = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", **SHAPE, **PUBLISHED, **INDEXER}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **SHAPE, **PUBLISHED}
GLM = {**V32, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "indexer_rope_interleave": True}


def on_cpu(patch) -> None:
    """Give SGLang's layers functions for CPU tensors: its own of torch, and here those that it has for CUDA alone."""
    from sglang.kernels import fused_op
    from sglang.kernels.ops.quantization import hadamard
    from sglang.kernels.spec import KernelBackend
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.runtime_context import get_parallel

    from mla_kernels.compat import sglang_dsa_kernels

    def transform(x, scale):
        signs = torch.ones(1, 1)
        while len(signs) < x.shape[-1]:
            signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
        return ((x.float() @ signs) * scale).to(x.dtype)

    class OnCard(torch.Tensor):
        """SGLang's indexer asks its queries for the number of their card."""

        device = property(lambda self: torch.device("cuda:0"))

    ragged, scores = Indexer._get_topk_ragged, sglang_dsa_kernels._fp8_mqa_logits
    replaced = {
        "forward_native": Indexer.forward_cuda,
        "_weights_proj_bf16_in_fp32_out": lambda self, x: x.float() @ self.weights_proj.weight.float().T,
        "_get_topk_ragged": lambda self, dual, batch, layer, q, *more: ragged(
            self, dual, batch, layer, q.as_subclass(OnCard), *more
        ),
    }
    for name, value in replaced.items():
        patch.setattr(Indexer, name, value)
    plain = torch.Tensor.as_subclass
    patch.setattr(sglang_dsa_kernels, "_fp8_mqa_logits", lambda q, *more, **options: scores(
        plain(q, torch.Tensor), *more, **options
    ))  # fmt: skip
    patch.setattr(get_parallel(), "_overrides", {})  # those that SGLang's kit of tests leaves in a process
    patch.setattr(hadamard, "hadamard_transform", transform)
    patch.setattr(fused_op, "_forced_backend", KernelBackend.TORCH)
    patch.setattr(torch._dynamo.config, "disable", True)


class Posing(TorchFunctionMode):
    """CPU tensors say that they are CUDA's, which SGLang's kernels of metadata ask for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return True if function == torch.Tensor.is_cuda.__get__ else function(*args, **(kwargs or {}))


def resolved(shape, *options):
    """SGLang's arguments of a model of that shape, after its own resolution: (record, view)."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape))
    record = prepare_server_args(["--model-path", str(folder), "--skip-tokenizer-init", *options])
    record.resolve_once()
    return record, resolved_view(record)


class Engine:
    """SGLang's model runner, with its pools and its backend."""

    def __init__(self, shape, weights, *options):
        from safetensors.torch import save_file
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import bootstrap
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.runtime_context import SpawnRanks, get_resources, publish

        record, _ = resolved(
            shape, "--max-total-tokens", str(TOKENS), "--max-running-requests", "8",
            "--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled", *options,
        )  # fmt: skip
        named = {name: value.bfloat16().contiguous() for name, value in weights.items()}
        save_file(named, Path(record.model_path) / "model.safetensors", {"format": "pt"})
        publish(record, role="scheduler", ranks=SpawnRanks(gpu_id=0, world_rank=0))
        config = ModelConfig.from_server_args(record)
        if not bootstrap._PARALLEL_INITIALISED:
            bootstrap._resolve_backend = lambda device: "gloo"
            bootstrap.init_parallel_runtime(server_args=record, device="cuda", dist_port=_free_port())
        bootstrap.init_layer_runtime(model_config=config)
        get_resources().expert_location_metadata = None  # of an earlier engine
        self.runner = ModelRunner(
            model_config=config, mem_fraction_static=0.5, gpu_id=0, nccl_port=0, server_args=record
        )  # fmt: skip
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self.backend = self.runner.attn_backend
        for buffers in (self.runner.token_to_kv_pool.kv_buffer, self.runner.token_to_kv_pool.index_k_with_scale_buffer):
            for data in buffers:
                data.view(torch.uint8).fill_(0xFF)  # NaN until it is written

    def batch(self, mode, requests):
        """SGLang's batch of [(row, pages, tokens, context)] in a mode, and what its tables say."""
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, compute_position

        table = self.runner.req_to_token_pool.req_to_token
        for row, pages, tokens, context in requests:
            slots = (torch.tensor(pages, dtype=torch.int32)[:, None] * PAGE + torch.arange(PAGE)).flatten()
            table[row, : context + len(tokens)] = slots[: context + len(tokens)].int()
        rows = torch.tensor([row for row, *_ in requests])
        sizes = [len(tokens) for _, _, tokens, _ in requests]
        contexts = [context for *_, context in requests]
        lengths = torch.tensor(sizes) + torch.tensor(contexts)
        if mode.is_target_verify():
            lengths -= torch.tensor(sizes)  # there lengths are those before the drafts
        places = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, sizes)])
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(requests),
            input_ids=torch.tensor([token for _, _, tokens, _ in requests for token in tokens]),
            req_pool_indices=rows,
            seq_lens=lengths,
            out_cache_loc=table[torch.repeat_interleave(rows, torch.tensor(sizes)), places].long(),
            seq_lens_sum=int(lengths.sum()),
            seq_lens_cpu=lengths,
            positions=places,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        if mode.is_extend(include_draft_extend_v2=True) and not mode.is_target_verify():
            batch.extend_num_tokens = sum(sizes)
            batch.extend_seq_lens, batch.extend_prefix_lens = (torch.tensor(part).int() for part in (sizes, contexts))
            batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = sizes, contexts
            given = batch.extend_prefix_lens, batch.extend_seq_lens, batch.extend_num_tokens
            batch.positions, batch.extend_start_loc = compute_position("torch_native", *given)
        return batch

    def capture(self, mode, requests):
        """Make the metadata that a captured graph of such a batch would read."""
        self.backend.init_cuda_graph_state(8, 24)
        with torch.inference_mode():
            self.backend.init_forward_metadata_out_graph(self.batch(mode, requests), in_capture=True)
        return self.backend.forward_metadata

    def step(self, mode, requests, replayed=False):
        """(logits [tokens, vocabulary], {layer: picks [tokens, top_k]}) of one step.

        ``replayed``: over the metadata of :meth:`capture`, which are written in place.
        """
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        batch = self.batch(mode, requests)
        context = ForwardContext(attn_backend=self.backend)
        with torch.inference_mode(), forward_context(context, forward_batch=batch), recorded(self) as picks:
            with Posing():
                prepare = (
                    self.backend.init_forward_metadata_out_graph if replayed else self.backend.init_forward_metadata
                )
                prepare(batch)
            hidden = self.runner.model.model(batch.input_ids, batch.positions, batch)
            return (hidden @ self.runner.model.lm_head.weight.T).float(), picks


@contextmanager
def recorded(engine):
    """Layer -> the picks that its attention read, while the block runs."""
    found, backend = {}, engine.backend
    attend = type(backend)._attend

    def run(q, k, layer, *arguments, topk_indices, **options):
        found[layer.layer_id] = topk_indices.clone()
        return attend(backend, q, k, layer, *arguments, topk_indices=topk_indices, **options)

    backend._attend = run
    try:
        yield found
    finally:
        del backend._attend


def serve(engine, texts, schedule):
    """Run the texts as ``schedule`` says: steps of (mode, [(text, tokens)]).

    Returns a list of (logits [tokens, vocabulary], {layer: picks [tokens, top_k]}), of the tokens that were run.
    """
    done = list(CACHED)
    logits, picks = [[] for _ in texts], [{} for _ in texts]
    for mode, step in schedule:
        requests = [(p + 1, PAGES_OF[p], texts[p][done[p] : done[p] + n], done[p]) for p, n in step]
        out, made = engine.step(mode, requests)
        sizes = [n for _, n in step]
        for (p, n), part in zip(step, out.split(sizes)):
            logits[p].append(part)
            done[p] += n
        for layer, chosen in made.items():
            for (p, _), part in zip(step, chosen.split(sizes)):
                picks[p].setdefault(layer, []).append(part)
    assert done == [len(text) for text in texts]
    return [
        (torch.cat(parts), {layer: torch.cat(chosen) for layer, chosen in by_layer.items()})
        for parts, by_layer in zip(logits, picks)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
