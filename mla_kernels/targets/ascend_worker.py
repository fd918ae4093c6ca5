"""Ascend compile worker: one JSON job a line on stdin, one JSON answer a line on stdout (protocol: service.py).

Runs as a script under the Python of an environment with triton-ascend and ascendnpu-ir; imports nothing of mla_kernels.

``report`` takes a kernel through Triton's front end, triton-adapter (to "ttadapter" IR, what the Ascend compiler reads)
and bishengir-compile up to on-chip memory planning. The compiler's last step, from there to machine code, is closed and
not in the package: a file ``module.hivm.opt.mlir`` is success. Ascend cores have no register spilling that this stage
could show: every tile lives in a buffer that memory planning placed, or the compile fails with an overflow. Spills and
traps are therefore 0 by construction. L0A and L0B stay 0 here: the matrix instructions, still whole at this stage, fill
them piece by piece.

``emulate`` turns the same ttadapter IR into x86-64 assembly (see ascend_to_llvm.py).
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import ascend_to_llvm
import ascendnpuir
from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(ascendnpuir.__file__).parent / "bin"
os.environ["PATH"] = f"{BIN}:{os.environ.get('PATH', '')}"
TIMEOUT = 240  # seconds for one bishengir run
SOURCES = tempfile.TemporaryDirectory(prefix="mla_kernels_ascend_")

SPACES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}
ELEMENT_BYTES = {
    "f64": 8,
    "index": 8,
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "i1": 0.125,
}


class CompileError(Exception):
    """A stage refused the kernel: the message names the stage and gives its words, ``memory`` what did not fit."""

    def __init__(self, message: str, memory: dict[str, int] | None = None):
        super().__init__(message)
        self.memory = memory or {}


def is_a5(architecture: str) -> bool:
    """Whether the target is of the 950 generation, which has a compiler of its own."""
    return architecture.startswith("Ascend950")


def load(source: str, function: str):
    """The jit function called ``function`` of a module made of ``source`` (a file that stays: Triton reads it back)."""
    name = "kernel_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    if name not in sys.modules:
        path = Path(SOURCES.name) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return getattr(sys.modules[name], function)


def to_ttadapter(job: dict) -> str:
    """Kernel source to ttadapter IR. CompileError names the stage that failed."""
    stage = "triton front end"
    try:
        fn = load(job["source"], job["function"])
        constants = job["constexprs"]
        missing = set(fn.arg_names) - set(constants) - set(job["signature"])
        if missing:
            raise TypeError(f"no type or constant for {', '.join(sorted(missing))}")
        # triton-ascend 3.2 reads types by order, not by name
        kinds = {name: job["signature"][name].split(":")[0] for name in fn.arg_names if name not in constants}
        options = dict(job.get("options") or {})
        for later in ("multibuffer", "cpu", "optimise"):  # options of the stages after this one
            options.pop(later, None)
        if is_a5(job["architecture"]):
            options |= {"compile_on_910_95": True, "enable_select_analysis": True}
        target = GPUTarget("npu", "Ascend910B3", 0)  # the adapter's other target is chosen by compile_on_910_95
        backend = ascend.AscendBackend(target)
        parsed = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = ASTSource(fn=fn, signature=kinds, constants=constants).make_ir(
            parsed, backend.get_codegen_implementation(), backend.get_module_map(), context
        )
        metadata = {"target": target, **parsed.__dict__}
        stage = "ttir"
        module = ascend.make_ttir(module, metadata, parsed)
        stage = "triton-adapter"
        return ascend.ttir_to_linalg(module, metadata, parsed, named_ops=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{stage}: {error_lines(error.stderr or b'')}") from error
    except Exception as error:
        raise CompileError(f"{stage}: {type(error).__name__}: {str(error)[:1500]}") from error


def error_lines(output: bytes | str) -> str:
    """The lines of a compiler's output that say what is wrong, without the IR it dumps."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in text.splitlines() if re.search(r"error|overflow|Assert|ERROR|terminate", line)]
    lines = [line for line in lines if "hivmc" not in line]
    lines = [re.sub(r"(see current operation).*", r"\1", line)[:300] for line in lines]
    lines = [line for line in lines if "Failed to run" not in line] or lines
    return " | ".join(dict.fromkeys(lines))[:1200] or text[-600:]


def overflows(output: str) -> dict[str, tuple[int, int]]:
    """Memory -> (bytes required, bytes there are), for each overflow that bishengir reported."""
    found = re.findall(r"(\w+) overflow, requires (\d+) bits while (\d+) bits", output)
    return {SPACES.get(name, name): (int(need) // 8, int(have) // 8) for name, need, have in found}


def in_words(overflow: dict[str, tuple[int, int]]) -> str:
    """``"UB overflow: 200.0 of 192.0 KiB"``, or "" where nothing overflowed."""
    return "; ".join(f"{name} overflow: {a / 1024:.1f} of {b / 1024:.1f} KiB" for name, (a, b) in overflow.items())


def bishengir(ttadapter: str, architecture: str, multibuffer: bool, folder: Path) -> tuple[str | None, str]:
    """Run bishengir; the IR after memory planning (None where it failed) and what the compiler said."""
    source, planned = folder / "kernel.ttadapter.mlir", folder / "module.hivm.opt.mlir"
    source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", ttadapter))
    planned.unlink(missing_ok=True)
    command = [
        str(BIN / ("bishengir-compile-a5" if is_a5(architecture) else "bishengir-compile")),
        str(source),
        f"--target={architecture}",
        f"--enable-auto-multi-buffer={str(multibuffer).lower()}",
        "--enable-auto-bind-sub-block=true",
        "--enable-hfusion-compile=true",
        *([] if is_a5(architecture) else ["--enable-hivm-compile=true"]),
        "--enable-triton-kernel-compile=true",
        f"--save-temps={folder}",
        "-o",
        str(folder / "kernel"),
    ]
    try:
        result = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, f"error: no result after {TIMEOUT} s"
    said = (result.stderr + result.stdout).decode(errors="replace")
    return (planned.read_text() if planned.exists() else None), said


def memory_use(planned: str) -> dict[str, int]:
    """Peak end offset in each on-chip memory, the largest over the functions (cube and vector halves are two)."""
    used = dict.fromkeys(SPACES.values(), 0)
    offsets: dict[str, int] = {}
    for line in planned.splitlines():
        if "func.func" in line:
            offsets = {}
        constant = re.match(r"\s*(%[\w-]+) = (?:arith\.constant|llvm\.mlir\.constant\()\s*(-?\d+)", line)
        if constant:
            offsets[constant[1]] = int(constant[2])
        cast = re.search(r"hivm\.hir\.pointer_cast\(([^)]*)\).*?: memref<([0-9x]+)x(\w+),.*?address_space<(\w+)>", line)
        if cast and cast[4] in SPACES:
            count = 1
            for extent in cast[2].split("x"):
                count *= int(extent)
            size = int(count * ELEMENT_BYTES.get(cast[3], 8))
            ends = [offsets[name.strip()] + size for name in cast[1].split(",") if name.strip() in offsets]
            space = SPACES[cast[4]]
            used[space] = max([used[space], *ends])
    return used


def count(pattern: str, text: str) -> int:
    return sum(1 for line in text.splitlines() if re.search(pattern, line))


def describe(planned: str, ttadapter: str) -> dict:
    """What else the planned IR tells: instruction counts and the GM workspace of one program in bytes."""
    core = re.search(r"module_core_type = #hivm\.module_core_type<(\w+)>", planned)
    workspace = re.search(r"infer_workspace_shape_function.*?\n(.*?return)", planned, re.S)
    sizes = re.findall(r"constant (\d+)", workspace[1]) if workspace else []
    mode = re.search(r'mix_mode\s*=\s*"([^"]+)"', ttadapter)
    return {
        "core": core[1] if core else None,
        "mix_mode": mode[1] if mode else None,
        "workspace_bytes": int(sizes[-1]) if sizes else 0,
        "scalar_gm_loads": count(r"memref\.load .*address_space<gm>|llvm\.load .*!llvm.ptr<1>", planned),
        "scalar_gm_stores": count(r"memref\.store .*address_space<gm>|llvm\.store .*!llvm.ptr<1>", planned),
        "scalar_ub_loads": count(r"memref\.load .*address_space<ub>", planned),
        "scalar_ub_stores": count(r"memref\.store .*address_space<ub>", planned),
    }


def report(job: dict, folder: Path) -> dict:
    """Answer of a ``report`` job."""
    ttadapter = to_ttadapter(job)
    architecture = job["architecture"]
    multibuffer = (job.get("options") or {}).get("multibuffer", True)
    planned, said = bishengir(ttadapter, architecture, multibuffer, folder)
    overflow = overflows(said)  # with a plan: the compiler tried again without multibuffer by itself
    if planned is None and overflow and multibuffer and is_a5(architecture):  # a5 does not try again by itself
        planned, said = bishengir(ttadapter, architecture, False, folder)
    if planned is None:
        overflow = overflows(said)
        memory = {name: need for name, (need, _) in overflow.items()}
        raise CompileError(in_words(overflow) or f"bishengir: {error_lines(said)}", memory)
    if job.get("output"):
        Path(job["output"] + ".ttadapter.mlir").write_text(ttadapter)
        Path(job["output"] + ".planned.mlir").write_text(planned)
    return {
        "ok": True,
        "reason": "",
        "registers": None,
        "spills": 0,
        "loop_spills": 0,
        "memory": memory_use(planned),
        "traps": 0,
        "tensor_instructions": count(r"call @\w*mma|hivm\.hir\.mmad|intr\.hivm\.\w*(?i:mad)", planned),
        "detail": describe(planned, ttadapter) | {"retried_without_multibuffer": in_words(overflow)},
    }


def emulate(job: dict) -> dict:
    """Answer of an ``emulate`` job; writes ``<output>.s`` and the IR it came from beside it."""
    ttadapter = to_ttadapter(job)
    output = job["output"]
    Path(output + ".ttadapter.mlir").write_text(ttadapter)
    try:
        native = ascend_to_llvm.compile_native(ttadapter, job["options"]["cpu"], job["options"]["optimise"])
    except ascend_to_llvm.StageError as error:
        raise CompileError(str(error)) from error
    Path(output + ".llvm.mlir").write_text(native.llvm_dialect)
    Path(output + ".s").write_text(native.assembly)
    return {"ok": True, "reason": "", "name": native.name, "args": native.arguments, "atomic": native.atomic}


def answer(job: dict) -> dict:
    """Run one job; an ordinary compile error is an answer, not an exception."""
    try:
        if job["action"] == "report":
            with tempfile.TemporaryDirectory() as folder:
                return report(job, Path(folder))
        if job["action"] == "emulate":
            return emulate(job)
        raise CompileError(f"action {job['action']!r}: report and emulate are known")
    except Exception as error:
        ordinary = isinstance(error, CompileError)
        reason = str(error) if ordinary else f"ascend worker: {type(error).__name__}: {error}"
        return {
            "ok": False,
            "reason": reason,
            "registers": None,
            "spills": 0,
            "loop_spills": 0,
            "memory": error.memory if ordinary else {},
            "traps": 0,
            "tensor_instructions": 0,
            "detail": {},
        }


def main(answer=answer) -> None:
    """Answer the jobs on standard input, a line each."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compilers print must not mix with the answers
    for line in sys.stdin:
        if line.strip():
            channel.write(json.dumps(answer(json.loads(line))) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
