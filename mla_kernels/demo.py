"""``python -m mla_kernels demo``: one Hugging Face DeepSeek model, with transformers' own code and over mla_kernels.

The same text from both, how fast each was, what their caches hold, and what every target's compiler makes of the
kernels behind it. With ``--backend npu-emulated`` mla_kernels also runs on an emulated Ascend NPU. Needs
``pip install 'mla_kernels[transformers]'``.
"""

import argparse
import importlib
import importlib.util
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from mla_kernels import check, launch, tiles
from mla_kernels.targets import emulated_npu, service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_many, compiler_version

PROMPT = """\
Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing \
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is \
a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the \
mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin \
warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper hand \
of me, that it requires a strong moral principle to prevent me from deliberately stepping into the street, and \
methodically knocking people's hats off—then, I account it high time to get to sea as soon as I can. This is my \
substitute for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to \
the ship. There is nothing surprising in this. If they but knew it, almost all men in their degree, some time or \
other, cherish very nearly the same feelings towards the ocean with me."""
"""The opening of Herman Melville's Moby-Dick (1851), public domain."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_STD = 0.04  # of the seeded weights: with DeepSeek's 0.02, greedy text falls into a loop at once

V2_LITE = dict(
    hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=3, num_attention_heads=16,
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy",
    routed_scaling_factor=1.0, max_position_embeddings=163840, rms_norm_eps=1e-6,
    rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=40.0, original_max_position_embeddings=4096, beta_fast=32,
        beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
    ),
)  # fmt: skip
"""deepseek-ai/DeepSeek-V2-Lite's config.json, cut to 3 of its 27 layers."""

SMOKE = V2_LITE | dict(
    hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_attention_heads=4, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2,
)  # fmt: skip


class ByteTokenizer:
    """Text as its UTF-8 bytes, after a token that begins it."""

    begin, vocabulary = 256, 257

    def encode(self, text: str) -> list[int]:
        return [self.begin, *text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Unusable(ValueError):
    """A checkpoint that the demo cannot run."""


@dataclass
class Side:
    """What one implementation did: its tokens, its times in seconds, and its cache of the last run."""

    name: str
    tokens: list[int] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    cache: object = None


def build_model(sizes: dict, dtype: torch.dtype, seed: int):
    """A ``DeepseekV2ForCausalLM`` of these sizes with seeded uniform weights."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
    from transformers.initialization import no_init_weights

    config = DeepseekV2Config(
        **sizes, vocab_size=ByteTokenizer.vocabulary, bos_token_id=ByteTokenizer.begin, eos_token_id=None,
        pad_token_id=ByteTokenizer.begin,
    )  # fmt: skip
    with no_init_weights():
        model = DeepseekV2ForCausalLM._from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    bound = WEIGHT_STD * 3**0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(1)
    return model.eval()


def load_model(path: str, dtype: torch.dtype):
    """A local checkpoint and its tokenizer. Unusable where it is none, or of a model that enable refuses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mla_kernels.compat.transformers import disable, enable

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:  # a file is missing, or of something else
        raise Unusable(f"--model: {path} cannot be loaded: {error}") from error
    try:
        disable(enable(model))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise Unusable(f"--model: {path}: {error}") from error
    return model.eval(), tokenizer


def generate(model, ids: torch.Tensor, tokens: int, side: Side) -> None:
    """Greedy generation of exactly ``tokens`` tokens; times and tokens go to ``side``."""
    from transformers import StoppingCriteria

    times = []

    class Clock(StoppingCriteria):
        """Looks at the time after each token, and never stops."""

        def __call__(self, input_ids, scores, **kwargs):
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    times.append(time.perf_counter())
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        stopping_criteria=[Clock()], return_dict_in_generate=True,
    )  # fmt: skip
    took = [after - before for before, after in pairwise(times)]
    side.prefill.append(took[0])
    side.steps += took[1:]
    side.tokens = out.sequences[0, ids.shape[1] :].tolist()
    side.cache = out["cache" if "cache" in out else "past_key_values"]  # its name from transformers 5.24 on, and before


def compare(model, ids: torch.Tensor, tokens: int, rounds: int, progress) -> tuple[Side, Side]:
    """Both implementations, turn by turn, after a short warm-up of each."""
    from mla_kernels.compat.transformers import disable, enable

    theirs = Side(f"transformers ({model.config._attn_implementation}, {model.config._experts_implementation})")
    ours = Side("mla_kernels")
    task = progress.add_task("warm-up", total=2 * rounds + 2)
    with torch.no_grad():
        for turn in range(rounds + 1):
            for side, switch in ((theirs, disable), (ours, enable)):
                progress.update(task, description=f"{side.name}, " + (f"round {turn}" if turn else "warm-up"))
                switch(model)
                if turn:
                    generate(model, ids, tokens, side)
                else:
                    generate(model, ids[:, :32], 2, Side(""))
                progress.advance(task)
    progress.remove_task(task)
    disable(model)
    return theirs, ours


def run_emulated(model, ids: torch.Tensor, tokens: int, progress):
    """transformers and mla_kernels on the CPU, then mla_kernels on the emulated NPU, to which the model moves.

    Returns the three sides and what the NPU executed: (op, kernel) -> launches.
    """
    from mla_kernels.compat.transformers import disable, enable

    sides = Side("transformers, cpu"), Side("mla_kernels, cpu"), Side(f"mla_kernels, {EMULATED}")
    task = progress.add_task("", total=len(sides))
    with torch.no_grad():
        for side, switch in zip(sides, (disable, enable, enable)):
            progress.update(task, description=side.name)
            switch(model)
            if side is sides[-1]:
                model.to("npu")
                ids = ids.to("npu")
            with emulated_npu.record() as executed, tiles.silent():
                generate(model, ids, tokens, side)
            progress.advance(task)
    progress.remove_task(task)
    return sides, executed


def emulated_tables(sides, executed, prompt_tokens: int):
    """What each side took, and the kernels that the emulator executed."""
    from rich import box
    from rich.table import Table

    times = Table(title="Seconds; the emulator's are none of an NPU's", box=box.SIMPLE_HEAD)
    times.add_column("")
    for side in sides:
        times.add_column(side.name, justify="right")
    times.add_row(f"prefill, {prompt_tokens} tokens", *(f"{side.prefill[0]:.2f}" for side in sides))
    if sides[0].steps:
        times.add_row("a decoded token (median)", *(f"{statistics.median(side.steps):.3f}" for side in sides))
    kernels = Table(title="Executed by the NPU emulator", box=box.SIMPLE_HEAD)
    for name in ("op", "kernel", "launches"):
        kernels.add_column(name, justify="right" if name == "launches" else "left")
    for (op, kernel), count in sorted(executed.items(), key=str):
        kernels.add_row(op or "-", kernel or "none", f"{count:,}")
    return times, kernels


def speed_table(theirs: Side, ours: Side, prompt_tokens: int):
    """Tokens a second of both, and the ratios of their times."""
    from rich import box
    from rich.table import Table

    made = Table(title="Speed: tokens a second (median)", box=box.SIMPLE_HEAD)
    made.add_column("")
    for name in (theirs.name, ours.name, "ratio"):
        made.add_column(name, justify="right")
    rows = [(f"prefill, {prompt_tokens} tokens", prompt_tokens, [statistics.median(s.prefill) for s in (theirs, ours)])]
    if ours.steps:
        rows.append(("decode, one token at a time", 1, [statistics.median(s.steps) for s in (theirs, ours)]))
    for label, count, (before, after) in rows:
        made.add_row(label, f"{count / before:,.1f}", f"{count / after:,.1f}", f"[bold]{before / after:.2f}x[/]")
    return made


def cache_table(theirs: Side, ours: Side, config):
    """Bytes a token in one layer: ours, transformers' own, and what K and V of every head would take."""
    from rich import box
    from rich.table import Table

    layer = ours.cache.layers[0]
    element = layer.cache.data.element_size()
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    heads = config.num_attention_heads * width * element
    own = theirs.cache.layers[0]
    own_bytes = (own.keys.nbytes + own.values.nbytes) // own.keys.shape[-2]
    made = Table(title="Cache: bytes a token and layer", box=box.SIMPLE_HEAD)
    for name in ("cache", "bytes", "of multi-head", "what it holds"):
        made.add_column(name, justify="right" if name in ("bytes", "of multi-head") else "left")
    rows = [
        ("multi-head K and V", heads, f"{config.num_attention_heads} heads x {width} values"),
        ("transformers", own_bytes, "latents too; expands K and V of every token at every step"),
        (
            "mla_kernels",
            layer.bytes_per_token,
            f"latent {layer.cache.latent_dim} + rotated key {layer.cache.rope_dim}, pages of {layer.page_size}; "
            "attends to them as they are",
        ),
    ]
    for name, size, what in rows:
        made.add_row(name, f"{size:,}", f"{100 * size / heads:.1f}%", what)
    return made


EMULATED = "npu-emulated"
OF_THE_MODEL = (
    "write_latent_kernel", "mla_prefill_kernel", "mla_decode_kernel", "merge_splits_kernel", "route_kernel",
    "moe_dispatch_kernel", "moe_inverse_kernel", "moe_gate_up_kernel", "moe_down_kernel", "moe_combine_kernel",
)  # fmt: skip
"""Kernels that a DeepSeek-V2 model launches."""


def compile_matrix(console, progress) -> bool:
    """Print what the compilers make of the model's kernels for a target of each generation; whether all of them may be
    launched."""
    targets, missing = [], []
    for kind, names in (
        ("gpu", [chip.name for chip in CHIPS.values() if chip.is_gpu and chip.architecture == chip.generation]),
        ("ascend", [chip.name for chip in CHIPS.values() if not chip.is_gpu]),
    ):
        try:
            compiler_version(kind)
            targets += names
        except service.ToolchainMissing as reason:
            missing.append(f"[yellow]Not compiled for {', '.join(names)}:[/] {reason}")
    reports = []
    if targets:
        wanted = [
            request
            for request in check.requests(targets=targets)
            if request.kernel.name in OF_THE_MODEL and request.dtype == "bf16" and request.case == _case(request.kernel)
        ]
        task = progress.add_task("compiling", total=len(wanted))
        reports = compile_many(wanted, lambda report: progress.advance(task))
        progress.remove_task(task)
        console.print(check.table(reports))
    for line in missing:
        console.print(line)
    wrong = check.failures(reports)
    for report in wrong:
        console.print(f"[red]{report.target} {report.kernel}:[/] {report.problem}", markup=True)
    if reports:
        console.print(
            f"{len(reports)} compilations, {len(wrong)} failed. Nothing ran on a device; "
            "[bold]python -m mla_kernels check[/] compiles every kernel, case and dtype."
        )
    return not wrong


def _case(kernel: launch.Kernel) -> str:
    """The kernel's V2-Lite case, or its first."""
    return next((case.name for case in kernel.cases if "lite" in case.name.lower()), kernel.cases[0].name)


def machine() -> str:
    """Processor, threads and versions."""
    import transformers

    names = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names += [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line][
            :1
        ]
    return (
        f"{names[-1]}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def compare_texts(options, console, progress) -> bool:
    """Generate with every side and print texts, times and caches, or kernels; whether the texts are the same."""
    from rich.markup import escape

    task = progress.add_task("loading the model" if options.model else "drawing the weights", total=None)
    if options.model:
        model, tokenizer = load_model(options.model, DTYPES[options.dtype])
        about = f"{type(model).__name__} from {escape(options.model)}"
    else:
        model = build_model(SMOKE if options.smoke else V2_LITE, DTYPES[options.dtype], options.seed)
        tokenizer = ByteTokenizer()
        size = "a tiny DeepSeek-V2 model" if options.smoke else "DeepSeek-V2-Lite at full width, 3 of its 27 layers"
        about = f"{size}, seeded weights (so the text is noise), bytes as tokens, seed {options.seed}"
    progress.remove_task(task)
    ids = torch.tensor([tokenizer.encode(options.text)])
    ids = ids[:, :64] if options.smoke else ids
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"[bold]Model[/]    {about}; {parameters / 1e6:,.0f} M parameters, {options.dtype}")
    console.print(f"[bold]Machine[/]  {escape(machine())}")
    console.print(f"[bold]Prompt[/]   {ids.shape[1]} tokens: {escape(options.text[:90])}...")
    if options.backend == EMULATED:
        sides, executed = run_emulated(model, ids, options.tokens, progress)
    else:
        sides = compare(model, ids, options.tokens, options.rounds, progress)
    theirs, ours = sides[0], sides[-1]
    for side in sides:
        console.print(f"[bold]{escape(side.name)}[/] wrote {escape(ascii(tokenizer.decode(side.tokens)))}")
    equal = all(side.tokens == theirs.tokens for side in sides)
    same = sum(a == b for a, b in zip(theirs.tokens, ours.tokens))
    verdict = "[bold green]identical[/]" if equal else f"[bold red]different[/], {same} of {len(ours.tokens)} equal"
    console.print(f"Greedy text: {verdict} ({options.tokens} tokens, {len(set(ours.tokens))} different ones)")
    if options.backend == EMULATED:
        for table in emulated_tables(sides, executed, ids.shape[1]):
            console.print(table)
        return equal
    console.print(speed_table(theirs, ours, ids.shape[1]))
    console.print(
        f"[dim]{options.rounds} runs of each, turn by turn, on this machine. Prefill goes through mla_prefill here.[/]"
    )
    console.print(cache_table(theirs, ours, model.config))
    return equal


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mla_kernels demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", metavar="PATH", help="a local DeepSeek-V2 or V3 checkpoint with its tokenizer")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="a text (default: the opening of Moby-Dick)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="default fp32, the one held to equality")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="timed runs of each side (default 2)")
    parser.add_argument(
        "--backend", choices=("cpu", EMULATED), default="cpu",
        help=f"where mla_kernels runs: cpu (default), or {EMULATED}: there and on an Ascend NPU whose kernels the "
        "emulator executes, one run each and no compile matrix",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a short prompt, for tests")
    parser.add_argument("--no-matrix", action="store_true", help="leave out the compile matrix")
    options = parser.parse_args(arguments)
    for name in ("tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, at least 1 is accepted")
    if not -(2**63) <= options.seed < 2**64:
        parser.error(f"--seed: got {options.seed}, an integer from -2^63 to 2^64 - 1 is accepted")
    if options.model is not None and not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model: {options.model} is no folder with a config.json")
    if options.prompt is not None and not options.prompt.is_file():
        parser.error(f"--prompt: {options.prompt} is no file")
    try:
        options.text = PROMPT if options.prompt is None else options.prompt.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--prompt: {options.prompt} is no text in UTF-8: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the demo: 0, or 1 if the texts differ in fp32 or a kernel fails to compile, or 2 if something that it needs
    is missing or of a version that is not supported."""
    options = parse(arguments)
    missing = [name for name in ("rich", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the demo needs {' and '.join(missing)}: pip install 'mla_kernels[transformers]'", file=sys.stderr
        )
        return 2
    try:
        importlib.import_module("mla_kernels.compat.transformers")
    except ImportError as error:  # a version that is not supported
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.backend == EMULATED:
        try:
            emulated_npu.install()
        except RuntimeError as error:  # no Ascend compilers, or another device under PrivateUse1
            print(f"error: {error}", file=sys.stderr)
            return 2
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    begin = time.monotonic()
    console = Console()
    if not console.is_terminal:
        console.width = 132
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress, launch.on_cpu("torch"):
        try:
            equal = compare_texts(options, console, progress)
        except Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        good = options.no_matrix or options.backend == EMULATED or compile_matrix(console, progress)
    console.print(f"{time.monotonic() - begin:.0f} s in all")
    return int(not good or (options.dtype == "fp32" and not equal))
