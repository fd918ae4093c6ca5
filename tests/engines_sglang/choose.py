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


def choose(folder: str, options: list[str]) -> list | str:
    """[prefill backend, decode backend, runner of experts, page size]."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.server_args import prepare_server_args

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = prepare_server_args(["--model-path", folder, "--skip-tokenizer-init", *options])
            arguments.resolve_once()
    except (SystemExit, ValueError) as error:
        return f"refused: {errors.getvalue() or error}"
    view = resolved_view(arguments)
    return [*attention_backends_of(view), view.moe_runner_backend, view.page_size]


def main() -> None:
    pretend(*map(int, sys.argv[1].split(".")))
    logging.basicConfig(level=logging.INFO)
    from sglang.srt.plugins import load_plugins

    if "--without" not in sys.argv:
        load_plugins()
    with tempfile.TemporaryDirectory() as folder:
        made = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16"}
        Path(folder, "config.json").write_text(json.dumps(made | tiny.SHAPE | tiny.OF_THE_CHECKPOINT))
        print(json.dumps({name: choose(folder, options) for name, options in ASKED.items()}))


if __name__ == "__main__":
    main()
