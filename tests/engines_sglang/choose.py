"""What SGLang's argument handling chooses: ``python -m tests.engines_sglang.choose 8.0 [--without]`` prints JSON.

SGLang keeps what it found out about the platform, so that every capability needs a process of its own.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
from pathlib import Path

from tests.engines_sglang import tiny
from tests.engines_sglang.pretended import pretend

ASKED = {
    "nothing": [],
    "attention by name": ["--attention-backend", "mla_kernels"],
    "decoding by name": ["--attention-backend", "triton", "--decode-attention-backend", "mla_kernels"],
    "prefill by name": ["--attention-backend", "triton", "--prefill-attention-backend", "mla_kernels"],
    "deterministic": ["--attention-backend", "mla_kernels", "--enable-deterministic-inference"],
    "experts by name": ["--moe-runner-backend", "mla_kernels"],
    "both, pages of 64": [
        "--attention-backend", "mla_kernels", "--moe-runner-backend", "mla_kernels", "--page-size", "64",
    ],
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512, "dtype": "bfloat16",
}  # fmt: skip
OTHERS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 128,
        "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}  # fmt: skip
"""Configurations of models without latent attention."""


def resolve(folder: str, *options: str):
    """SGLang's view of its arguments, all of them resolved."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args(["--model-path", folder, "--skip-tokenizer-init", *options])
    arguments.resolve_once()
    return resolved_view(arguments)


def choose(folder: str, options: list[str]) -> list | str:
    """[prefill backend, decode backend, runner of experts, page size]."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            view = resolve(folder, *options)
    except (SystemExit, ValueError) as error:
        return f"refused: {errors.getvalue() or error}"
    return [*attention_backends_of(view), view.moe_runner_backend, view.page_size]


def everything(folder: str) -> dict[str, str]:
    """Every argument of SGLang, resolved, for a model that is served without options."""
    from sglang.srt.arg_groups.field_order import POSITIONAL_FIELD_ORDER

    view = resolve(folder, "--random-seed", "1")
    return {name: repr(getattr(view, name)).replace(folder, "") for name in POSITIONAL_FIELD_ORDER}


def main() -> None:
    pretend(*map(int, sys.argv[1].split(".")))
    logging.basicConfig(level=logging.INFO)
    from sglang.srt.plugins import load_plugins

    if "--without" not in sys.argv:
        load_plugins()
    with tempfile.TemporaryDirectory() as folder:
        made = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16"}
        Path(folder, "config.json").write_text(json.dumps(made | tiny.SHAPE | tiny.OF_THE_CHECKPOINT))
        chosen = {name: choose(folder, options) for name, options in ASKED.items()}
        for name, config in OTHERS.items():
            Path(folder, "config.json").write_text(json.dumps(SMALL | config))
            chosen[name] = everything(folder)
    print(json.dumps(chosen))


if __name__ == "__main__":
    main()
