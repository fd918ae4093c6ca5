"""A small DeepSeek-V3.2 or V3 in vLLM's own code for CUDA, on CPU tensors, driven step by step as its scheduler would.

vLLM keeps one configuration and one process group a process.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

PAGE, PAGES, TOP_K, WIDEST = 64, 24, 64, 512
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "first_k_dense_replace": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128, "n_group": 1, "topk_group": 1,
    "vocab_size": 512, "max_position_embeddings": WIDEST, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


INDEXER = {"index_n_heads": 4, "index_head_dim": 128, "index_topk": TOP_K}
V32 = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", **SHAPE, **INDEXER}
GLM5 = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", **SHAPE, **INDEXER,
    "qk_nope_head_dim": 192, "v_head_dim": 256, "indexer_rope_interleave": True, "index_topk_pattern": "FS",
}  # fmt: skip
"""Its second layer takes the picks of its first."""
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **SHAPE}


LENGTHS, CACHED = (150, 90, 140), (0, 0, 64)
PAGES_OF = ([3, 7, 1], [2, 9], [3, 11, 5])
"""Of three prompts: the third begins with the first's page, and finds its 64 tokens cached."""
MIXED = [
    [(0, 100)],
    [(0, 1), (1, 60)],
    [(0, 1), (1, 1), (2, 40)],
    [(0, 1), (1, 1), (2, 1)],
    [(0, 47), (1, 28), (2, 35)],
]
"""Steps of [(prompt, tokens)]: chunks, prompts beside decoding, decoding alone."""


def prompts() -> list[list[int]]:
    """Three prompts of these lengths."""
    torch.manual_seed(1)
    first, second, third = (torch.randint(0, SHAPE["vocab_size"], (length,)).tolist() for length in LENGTHS)
    return [first, second, first[: CACHED[2]] + third[CACHED[2] :]]


def judge(shape):
    """transformers' model in float32, of weights that bfloat16 holds."""
    import transformers

    (name,) = shape["architectures"]
    given = {key: shape[key] for key in {*shape} - {"architectures", "model_type", "rope_theta"}}
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**given, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        parameter.data = parameter.bfloat16().float()
    return model.eval()


class Engine:
    """vLLM's model with its caches and metadata builders: what a worker holds."""

    block = PAGE

    def __init__(self, shape, weights, cache_dtype="auto", speculative=0, **attention):
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from vllm.config import (
            AttentionConfig,
            CacheConfig,
            CompilationConfig,
            ModelConfig,
            SchedulerConfig,
            VllmConfig,
            set_current_vllm_config,
        )

        folder = tempfile.mkdtemp()
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        self.config = VllmConfig(
            model_config=ModelConfig(
                model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=WIDEST, enforce_eager=True
            ),
            cache_config=CacheConfig(block_size=self.block, cache_dtype=cache_dtype),
            scheduler_config=SchedulerConfig(
                max_model_len=WIDEST, max_num_batched_tokens=1024, max_num_seqs=8, is_encoder_decoder=False
            ),
            compilation_config=CompilationConfig(custom_ops=["none"]),
            attention_config=AttentionConfig(**attention),
        )
        self.current = lambda: set_current_vllm_config(self.config)
        with self.current():
            self._join()
            self.model = self._load(weights)
            if speculative:
                self.config.speculative_config = SimpleNamespace(
                    num_speculative_tokens=speculative,
                    enable_adaptive_verification=False,
                    parallel_drafting=False,
                    method="mtp",
                    use_dspark=lambda: False,
                )
            self.layers = self.config.compilation_config.static_forward_context
            made = {name: self._builder(name, layer) for name, layer in self.layers.items()}
            self.builders = {name: builder for name, builder in made.items() if builder is not None}

    @staticmethod
    def _join():
        from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
        from vllm.v1.worker import workspace

        if not torch.distributed.is_initialized():
            rendezvous = tempfile.mktemp()
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, backend="gloo")
            ensure_model_parallel_initialized(1, 1)
            workspace.init_workspace_manager(torch.device("cpu"))

    def _make(self):
        from vllm.model_executor.model_loader.utils import get_model_architecture

        made, _ = get_model_architecture(self.config.model_config)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return made(vllm_config=self.config)
        finally:
            torch.set_default_dtype(before)

    def _load(self, weights):
        from vllm.model_executor.layers.attention import MLAAttention

        model = self._make()
        loaded = model.load_weights(weights.items())
        missing = {name for name, _ in model.named_parameters()} - loaded
        assert not missing, missing
        for layer in model.modules():
            if isinstance(layer, MLAAttention):
                layer.process_weights_after_loading(torch.bfloat16)
        return model

    def _builder(self, name, layer):
        """The builder of a layer, after its cache was bound: bytes that are NaN until they are written."""
        backend = layer.get_attn_backend()
        spec = backend.customize_spec(layer.get_kv_cache_spec(self.config))
        data = torch.full((PAGES, spec.page_size_bytes), 0xFF, dtype=torch.uint8)
        layer.bind_kv_cache(data.view(spec.dtype).view(PAGES, 1, PAGE, -1))
        return self._made(backend, spec, name)

    def _made(self, backend, spec, name):
        made = backend.get_builder_cls()
        width = {"block_table_width": -(-WIDEST // spec.block_size)} if made.requires_block_table_width else {}
        return made(spec, [name], self.config, torch.device("cpu"), **width)

    def metadata(self, requests):
        """What vLLM's builders make of [(pages, tokens, context)]; decoding requests stand first."""
        common, positions, slots = self.common(requests, self.block)
        made = {name: builder.build(0, common) for name, builder in self.builders.items()}
        return made, positions, dict.fromkeys(made, slots)

    @staticmethod
    def common(requests, block):
        """(what vLLM's builders read of such requests, positions, slots) for pages of ``block`` tokens."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        lengths, contexts = torch.tensor([[len(tokens), context] for _, tokens, context in requests]).T
        starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        table = torch.zeros(len(requests), -(-WIDEST // block), dtype=torch.int32)
        for row, (pages, *_) in zip(table, requests):
            row[: len(pages)] = torch.as_tensor(pages)
        positions = torch.cat([torch.arange(c, c + n) for n, c in zip(lengths.tolist(), contexts.tolist())])
        rows = torch.repeat_interleave(torch.arange(len(requests)), lengths)
        slots = table[rows, positions // block].long() * block + positions % block
        seq_lens = (lengths + contexts).int()
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(requests),
            num_actual_tokens=len(positions),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            positions=positions,
        )
        return common, positions, slots

    def step(self, requests):
        """Logits [tokens, vocabulary] of one step."""
        from vllm.forward_context import set_forward_context

        with self.current(), torch.inference_mode():
            metadata, positions, slots = self.metadata(requests)
            ids = torch.tensor([token for _, tokens, _ in requests for token in tokens])
            with set_forward_context(metadata, self.config, num_tokens=len(ids), slot_mapping=slots):
                embedded = self.model.model.embed_tokens.weight[ids]
                return self.model.compute_logits(self.model(ids, positions, inputs_embeds=embedded)).float()


def serve(engine, prompts, schedule):
    """Run the prompts of :func:`prompts` as ``schedule`` says, as :data:`MIXED` does.

    Returns a list of (logits [tokens, vocabulary], {layer: picks [tokens, top_k]}), of the tokens that were run.
    """
    done = list(CACHED)
    logits, picks = [[] for _ in prompts], [{} for _ in prompts]
    for step in schedule:
        requests = [(PAGES_OF[p], prompts[p][done[p] : done[p] + n], done[p]) for p, n in step]
        with recorded(engine) as made:
            out = engine.step(requests)
        sizes = [n for _, n in step]
        for (p, n), part in zip(step, out.split(sizes)):
            logits[p].append(part)
            done[p] += n
        for name, chosen in made.items():
            for (p, _), part in zip(step, chosen.split(sizes)):
                picks[p].setdefault(name, []).append(part)
    assert done == [len(prompt) for prompt in prompts]
    return [
        (torch.cat(parts), {name: torch.cat(chosen) for name, chosen in by_layer.items()})
        for parts, by_layer in zip(logits, picks)
    ]


class recorded:
    """Layer -> the picks that its attention read, while the block runs; all before them for tokens without picks."""

    def __init__(self, engine):
        self.impls = {name: layer.impl for name, layer in engine.layers.items() if hasattr(layer, "impl")}

    def __enter__(self):
        found = {}

        def recording(name, impl):
            sparse, dense = type(impl).forward_mqa, getattr(type(impl), "forward_mha", None)

            def mqa(q, *args):
                tokens = (q[0] if isinstance(q, tuple) else q).shape[0]
                if impl.is_sparse:
                    picks = impl.topk_indices_buffer[:tokens].clone()
                    found[name] = torch.cat([picks, found[name]]) if name in found else picks
                return sparse(impl, q, *args)

            def mha(q, kv, k_pe, cache, metadata, *args, **others):
                if impl.is_sparse:
                    lengths = metadata.query_start_loc.diff().tolist()
                    ends = metadata.seq_lens.tolist()
                    spans = list(zip(ends, lengths))[metadata.num_decodes :]
                    tokens = torch.cat([torch.arange(end - n, end, dtype=torch.int32) for end, n in spans])
                    seen = torch.arange(TOP_K, dtype=torch.int32)
                    found[name] = torch.where(seen > tokens[:, None], -1, seen)
                return dense(impl, q, kv, k_pe, cache, metadata, *args, **others)

            return mqa, mha

        for name, impl in self.impls.items():
            impl.forward_mqa, impl.forward_mha = recording(name, impl)
        return found

    def __exit__(self, *_):
        for impl in self.impls.values():
            del impl.forward_mqa, impl.forward_mha
