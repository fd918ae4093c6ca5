"""Compiler process for NVIDIA and AMD: one JSON job a line on stdin, one JSON answer a line on stdout.

Run as a script by :mod:`mla_kernels.targets.service` in a process without ``TRITON_INTERPRET``. Needs no GPU and no
torch, and imports nothing of the package but the sibling files that read machine code.

A job: ``source`` (text of a module), ``function`` (the kernel in it), ``language`` ("triton" or "gluon"), ``signature``
{argument: "*bf16" | "i32:16" | "tile<bf16[1,64,128]>" ...}, ``constexprs`` {argument: value}, ``vendor``,
``architecture`` ("90", "gfx942"), ``options``; ``output``, a path prefix, asks for the artefacts as files. The answer
says whether it compiled or why not, and what the machine code holds.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import amdgcn
import bounds
import loops
import ptx
import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

TENSOR_MEMORY_COLUMNS = 512
SERIALISED = re.compile(r"\(C75(?:0[89]|1\d)\)")
"""What ptxas -v says where it lets no two wgmma run at a time, or ignores how registers are dealt to warp groups."""
_SCRATCH = tempfile.TemporaryDirectory(prefix="mla_kernels_")


@functools.lru_cache(maxsize=64)
def load(source: str):
    """The module of this source text; a file of its own, because Triton reads a kernel's source back."""
    name = f"kernel_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = Path(_SCRATCH.name) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compile_job(job: dict):
    """(Triton's CompiledKernel for a job, what ptxas said of a Gluon kernel). Pointers count as divisible by 16, and so
    do arguments marked ":16", unless the kernel says that they make no instance of their own."""
    gluon = job["language"] == "gluon"
    fn = getattr(load(job["source"]), job["function"])
    signature, constexprs, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(fn.arg_names, fn.params)):
        if name in job["constexprs"]:
            signature[name] = "constexpr"
            constexprs[(position,)] = job["constexprs"][name]
            continue
        kind, _, divisor = job["signature"][name].partition(":")
        signature[name] = descriptor(kind) if kind.startswith("tile<") else kind
        plain = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if (divisor == "16" or kind.startswith("*")) and not plain:
            attributes[(position,)] = [["tt.divisibility", 16]]
    if job["vendor"] == "nvidia":
        target = GPUTarget("cuda", int(job["architecture"]), 32)
    else:
        target = GPUTarget("hip", job["architecture"], 64)
    source = (gluon_source if gluon else ASTSource)(fn, signature, constexprs, attributes)
    log = io.StringIO()
    with tempfile.TemporaryDirectory(dir=_SCRATCH.name) as folder:  # reports are cached, Triton's own files need not be
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = gluon
        with contextlib.redirect_stdout(log):
            return triton.compile(source, target=target, options=job["options"]), log.getvalue()


def gluon_source(*arguments):
    """Triton's ASTSource of a Gluon kernel."""
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource(*arguments)


def descriptor(tile: str) -> str:
    """Triton's type of the TMA descriptor of a ``tile<bf16[1,64,128]>``: boxes swizzled over the bytes of a row, at
    most 128."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    inner = tile.removeprefix("tile<").removesuffix(">")
    bits = 8 if inner.startswith("fp8") else 16
    width = min(128, bits // 8 * int(inner.rstrip("]").replace("[", ",").rpartition(",")[2]))
    layout = NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=inner.count(",") + 1)
    return f"tensordesc<{inner},{layout!r}>"


def disassemble(cubin: bytes) -> tuple[str, int]:
    """(listing, registers a thread) of a cubin."""
    path = Path(_SCRATCH.name) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-sass", "-res-usage", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return listing, int(re.search(r"\bREG:(\d+)", listing).group(1))


def describe(kinds: list[str], main: tuple[int, ...], shapes: dict[str, int]) -> dict:
    """The part of an answer that both vendors share."""
    return {
        "spills": kinds.count("spill"),
        "loop_spills": sum(kinds[i] == "spill" for i in main),
        "tensor_instructions": kinds.count("tensor"),
        "detail": {
            "instructions": len(kinds),
            "loop_instructions": len(main),
            "loop_mix": loops.mix(kinds, main),
            "loop_tensor_shapes": shapes,
            "async_copy": "async copy" in kinds,
        },
    }


def report_nvidia(compiled, gluon: bool) -> tuple[dict, dict[str, str]]:
    listing, registers = disassemble(compiled.asm["cubin"])
    instructions = sass.parse(listing)
    kinds = [sass.kind(instruction) for instruction in instructions]
    found = sass.loops(instructions)
    main = loops.main_loop(kinds, found)
    answer = describe(kinds, main, sass.tensor_shapes([instructions[i] for i in main]))
    architecture = str(compiled.metadata.target.arch)
    if gluon:  # partitions have a loop each, and what one costs says nothing of the program
        answer["loop_spills"] = sum(kinds[i] == "spill" for i in {i for loop in found for i in loop})
    elif architecture in bounds.ARCHITECTURES and main:
        loop = [instructions[i] for i in main]
        answer["detail"]["loop_bounds"] = bounds.bounds(loop, compiled.metadata.num_warps, architecture)
    columns = compiled.metadata.tmem_size
    answer["traps"] = max(sass.traps(instructions), int(columns > TENSOR_MEMORY_COLUMNS))
    answer["registers"] = registers
    answer["detail"]["tensor_memory_columns"] = columns
    answer["detail"]["tma"] = any(instruction.name.startswith("UTMA") for instruction in instructions)
    return answer, {"sass": listing}


def report_amd(compiled, gluon: bool) -> tuple[dict, dict[str, str]]:
    text = compiled.asm["amdgcn"]
    instructions, found = amdgcn.parse(text)
    kinds = [amdgcn.kind(instruction) for instruction in instructions]
    main = loops.main_loop(kinds, found)
    answer = describe(kinds, main, amdgcn.tensor_shapes([instructions[i] for i in main]))
    resources = amdgcn.resources(text)
    answer["traps"] = kinds.count("trap")
    answer["registers"] = resources["vgpr_count"]
    answer["detail"]["accumulation_registers"] = resources["agpr_count"]
    answer["detail"]["scalar_spills"] = resources["sgpr_spill_count"]
    return answer, {}


def report(job: dict) -> dict:
    compiled, log = compile_job(job)
    gluon = job["language"] == "gluon"
    answer, artefacts = (report_nvidia if job["vendor"] == "nvidia" else report_amd)(compiled, gluon)
    if gluon:
        answer["detail"]["serialised"] = [line.strip() for line in log.splitlines() if SERIALISED.search(line)]
        answer["detail"]["unmet"] = ptx.problems(compiled.asm["ptx"]) if job["vendor"] == "nvidia" else []
    answer["detail"]["warps"] = compiled.metadata.num_warps
    answer |= {"ok": True, "reason": "", "memory": {"shared": compiled.metadata.shared}}
    if job.get("output"):
        artefacts |= {name: compiled.asm[name] for name in compiled.asm if name not in ("source", "llir")}
        for name, content in artefacts.items():
            path = Path(f"{job['output']}.{name}")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return answer


def reason(error: Exception) -> str:
    """A compiler's error in one line, with the kernel's line where Triton names one."""
    where = ""
    while True:
        if isinstance(error, CompilationError) and error.src and hasattr(error.node, "lineno"):
            where = f" at `{error.src.splitlines()[error.node.lineno - 1].strip()}`"
        if error.__cause__ is None:
            break
        error = error.__cause__
    message = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"{type(error).__name__}{where}: {telling[0] if telling else 'no message'}"[:500]


def answer_to(job: dict) -> dict:
    try:
        if job["action"] != "report":
            return {"ok": False, "reason": f"action {job['action']!r}: the GPU compilers only report"}
        return report(job)
    except Exception as error:  # whatever a compiler raises is an answer
        return {"ok": False, "reason": reason(error)}


def main() -> None:
    # Compilers print: give the protocol a descriptor of its own and send everything else to stderr.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        protocol.write(json.dumps(answer_to(json.loads(line))) + "\n")
        protocol.flush()


if __name__ == "__main__":
    main()
