"""ttadapter IR, which the Ascend compiler reads, to x86-64 assembly.

Three stages: text rewrites of what upstream MLIR does not know, upstream passes of ``bishengir-opt`` down to the LLVM
dialect, and triton-ascend's own LLVM, which has an x86 backend. The rewrites only replace what they recognise; anything
else stays, and the passes refuse it by name.

Floating point: sums of products may be fused and sum reductions reassociated, as the NPU's compiler may do; nothing
else is relaxed.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ascendnpuir
from ascend_externals import SHAPED, VALUE, Unsupported, define_externals, element, extents, histogram

TRIPLE = "x86_64-unknown-linux-gnu"
NO_UNROLLING = "{loop_annotation = #llvm.loop_annotation<unroll = <disable = true>>}"
HIDDEN = "emulator_hidden"  # dialect name that matrix products get while elementwise steps are fused
FUSED = "fastmath<contract>"  # on the products and sums of matrix products, nowhere else
ATOMIC = "GenericAtomic"  # attribute of the read-modify-write loops that atomics are lowered to

FUSE = "--inline --symbol-dce --convert-elementwise-to-linalg --linalg-fuse-elementwise-ops --canonicalize --cse"
BUFFERIZE = (
    "--eliminate-empty-tensors --empty-tensor-to-alloc-tensor "
    "--one-shot-bufferize=allow-return-allocs-from-loops=true --canonicalize --cse --buffer-hoisting "
    "--buffer-loop-hoisting --ownership-based-buffer-deallocation --canonicalize --buffer-deallocation-simplification "
    "--bufferization-lower-deallocations --convert-bufferization-to-memref --canonicalize --cse"
)
LOWER = (
    "--convert-linalg-to-loops --lower-affine --loop-invariant-code-motion --canonicalize --cse --convert-scf-to-cf "
    "--memref-expand --expand-strided-metadata --lower-affine --arith-expand=include-bf16=true --convert-math-to-llvm "
    "--convert-math-to-libm --convert-complex-to-llvm --convert-vector-to-llvm --convert-index-to-llvm "
    "--convert-arith-to-llvm --finalize-memref-to-llvm --convert-func-to-llvm --convert-cf-to-llvm "
    "--convert-arith-to-llvm --canonicalize --cse --reconcile-unrealized-casts"
)


class StageError(Exception):
    """A stage did not take the kernel; the message names the stage and the construct."""


@dataclass(frozen=True)
class Native:
    """A kernel as assembly. ``arguments`` are the MLIR types of its C interface, grid sizes and ids included."""

    name: str
    arguments: list[str]
    atomic: bool
    llvm_dialect: str
    assembly: str


def compile_native(ttadapter: str, cpu: str, optimise: bool = True) -> Native:
    """ttadapter IR to assembly for ``cpu`` (an LLVM name such as x86-64-v3). StageError where a stage refuses.

    Without ``optimise`` LLVM takes a seventh of the time, and what it makes is many times slower.
    """
    entry = re.search(r"func\.func @(\w+)\((.*?)\) attributes \{SyncBlockLock", ttadapter, re.S)
    if entry is None:
        raise StageError("emulator: no kernel function in the ttadapter IR")
    arguments = re.findall(r"%arg\d+: (memref<\?x\w+>|[a-z]+\d+)", entry[2])
    stage = "emulator rewrites"
    try:
        text = rewrite(ttadapter)
        stage = "emulator fusion"
        text = matmuls_to_loops(run_passes(text, FUSE))
        stage = "emulator bufferization"
        text = products_to_vectors(copies_to_linalg(run_passes(text, BUFFERIZE)), cpu)
        stage = "emulator lowering"
        dialect = run_passes(text, LOWER)
        stage = "emulator llvm"
        assembly = to_assembly(dialect, cpu, optimise)
    except (Unsupported, RuntimeError) as error:
        raise StageError(f"{stage}: {error}") from error
    return Native(entry[1], arguments, ATOMIC in ttadapter, dialect, assembly)


def run_passes(text: str, passes: str) -> str:
    """``text`` after bishengir-opt's passes; RuntimeError with its words where one refuses."""
    tool = Path(ascendnpuir.__file__).parent / "bin" / "bishengir-opt"
    result = subprocess.run(
        [str(tool), "--allow-unregistered-dialect", *passes.split()], input=text, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(result.stderr[:2000] or f"bishengir-opt exit {result.returncode}")
    return result.stdout


# Rewrites before the passes -----------------------------------------------------------------------------------------


def rewrite(text: str) -> str:
    """Everything that upstream passes do not take, put into words that they do."""
    if "llvm.inline_asm" in text:
        raise Unsupported("inline assembly, which is another machine's")
    text = text.replace("attributes {SyncBlockLockArgIdx", "attributes {llvm.emit_c_interface, SyncBlockLockArgIdx")
    text = re.sub(r"@__hmf_(\w+f)\b", r"@\1", text)  # fp32 device functions have libm's names otherwise
    text = re.sub(r" \{tt\.[^{}]*\}", "", text)  # argument attributes
    text = re.sub(r"(\} )\{[^{}]*hivm\.[^{}]*\}", r"\1", text)  # scheduling hints on scf.if and scf.for
    text = re.sub(r"^\s*(annotation\.mark|gpu\.barrier|call @triton_print).*$", "", text, flags=re.M)
    text = re.sub(rf"{VALUE} = hivm\.hir\.pointer_cast\({VALUE}\) \[{VALUE}\] : {SHAPED}", _pointer_cast, text)
    text = re.sub(rf"{VALUE} = hfusion\.histogram {VALUE}, (\d+) : {SHAPED} -> {SHAPED}", histogram, text)
    text = define_externals(text)
    moved = rf"ins\({VALUE} : {SHAPED}\) outs\({VALUE} : {SHAPED}\)"
    text = re.sub(rf"linalg\.broadcast {moved} dimensions = \[([\d, ]*)\]", _broadcast, text)
    text = re.sub(rf"linalg\.transpose {moved} permutation = \[([\d, ]*)\]", _transpose, text)
    return _hide_matmuls(text)


def _pointer_cast(match: re.Match) -> str:
    """An i64 address and a length as a memref descriptor."""
    result, address, length, kind = match[1], match[2], match[3], match[4]
    q = "%q" + result[1:] + "_"  # prefix of fresh names
    descriptor = "!llvm.struct<(ptr, ptr, i64, array<1 x i64>, array<1 x i64>)>"
    return (
        f"{q}p = llvm.inttoptr {address} : i64 to !llvm.ptr\n{q}0 = llvm.mlir.undef : {descriptor}\n"
        f"{q}1 = llvm.insertvalue {q}p, {q}0[0] : {descriptor}\n{q}2 = llvm.insertvalue {q}p, {q}1[1] : {descriptor}\n"
        f"{q}z = llvm.mlir.constant(0 : i64) : i64\n{q}o = llvm.mlir.constant(1 : i64) : i64\n"
        f"{q}n = arith.index_cast {length} : index to i64\n{q}3 = llvm.insertvalue {q}z, {q}2[2] : {descriptor}\n"
        f"{q}4 = llvm.insertvalue {q}n, {q}3[3, 0] : {descriptor}\n"
        f"{q}5 = llvm.insertvalue {q}o, {q}4[4, 0] : {descriptor}\n"
        f"{result} = builtin.unrealized_conversion_cast {q}5 : {descriptor} to {kind}"
    )


def _map(rank: int, axes: list[int]) -> str:
    return f"affine_map<({', '.join(f'd{i}' for i in range(rank))}) -> ({', '.join(f'd{i}' for i in axes)})>"


def _generic(maps: list[str], iterators: list[str], inputs: str, output: str, body: str, result: str) -> str:
    kinds = ", ".join(f'"{kind}"' for kind in iterators)
    return (
        f"linalg.generic {{indexing_maps = [{', '.join(maps)}], iterator_types = [{kinds}]}} ins({inputs}) "
        f"outs({output}) {{\n{body}\n}} -> {result}"
    )


def _elementwise_move(match: re.Match, axes: list[int]) -> str:
    """A broadcast or transpose as a generic, so that it fuses: input axis k runs over output axis axes[k]."""
    value, value_type, output, output_type = match[1], match[2], match[3], match[4]
    rank, kind = len(extents(output_type)), element(value_type)
    body = f"^bb0(%in: {kind}, %out: {kind}):\n linalg.yield %in : {kind}"
    maps = [_map(rank, axes), _map(rank, list(range(rank)))]
    inputs, outputs = f"{value} : {value_type}", f"{output} : {output_type}"
    return _generic(maps, ["parallel"] * rank, inputs, outputs, body, output_type)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _broadcast(match: re.Match) -> str:
    added = _numbers(match[5])
    return _elementwise_move(match, [axis for axis in range(len(extents(match[4]))) if axis not in added])


def _transpose(match: re.Match) -> str:
    permutation = _numbers(match[5])
    return _elementwise_move(match, [permutation.index(axis) for axis in range(len(permutation))])


# Matrix products: out of the way of elementwise fusion, then loops ----------------------------------------------------


def _hide_matmuls(text: str) -> str:
    """Matmuls behind an unregistered op, which elementwise fusion leaves alone."""
    operands = rf"ins\({VALUE}, {VALUE} : {SHAPED}, {SHAPED}\) outs\({VALUE} : {SHAPED}\)(?: -> {SHAPED})?"

    def hide(match: re.Match) -> str:
        batch, left, right, left_type, right_type, out, out_type = match.groups()[:7]
        signature = f"({left_type}, {right_type}, {out_type}) -> {out_type}"
        return f'"{HIDDEN}.{batch or ""}matmul"({left}, {right}, {out}) : {signature}'

    return re.sub(rf"linalg\.(batch_)?matmul (?:\{{[^{{}}]*\}} )?{operands}", hide, text)


def matmuls_to_loops(text: str) -> str:
    """Hidden matmuls as generics over (batch,) i, k, j: the innermost loop runs along rows and each element still sums
    over k in order. Sum reductions may be reassociated, so that LLVM makes vectors of them."""
    operands = rf"\({VALUE}, {VALUE}, {VALUE}\) : \({SHAPED}, {SHAPED}, {SHAPED}\) -> {SHAPED}"
    text = re.sub(rf'"{HIDDEN}\.(batch_)?matmul"{operands}', _matmul, text)
    reduce = re.compile(r"linalg\.reduce .*?linalg\.yield", re.S)
    relaxed = (r"(arith\.addf %\w+, %\w+) :", r"\1 fastmath<reassoc> :")
    return reduce.sub(lambda match: re.sub(*relaxed, match[0]), text)


def _matmul(match: re.Match) -> str:
    batch, left, right, out, left_type, right_type, out_type = match.groups()[:7]
    lead = [0] if batch else []
    i, k, j = (len(lead) + axis for axis in range(3))
    rank = len(lead) + 3
    kind = element(out_type)
    is_float = kind[0] in "fb"
    suffix, fused = ("f", f" {FUSED}") if is_float else ("i", "")
    lines = [f"^bb0(%a: {element(left_type)}, %b: {element(right_type)}, %out: {kind}):"]
    names = []
    for name, given in (("%a", element(left_type)), ("%b", element(right_type))):
        if given != kind:
            lines.append(f"{name}w = arith.{'extf' if is_float else 'extsi'} {name} : {given} to {kind}")
        names.append(name if given == kind else name + "w")
    lines += [
        f"%p = arith.mul{suffix} {names[0]}, {names[1]}{fused} : {kind}",
        f"%s = arith.add{suffix} %out, %p{fused} : {kind}",
        f"linalg.yield %s : {kind}",
    ]
    maps = [_map(rank, [*lead, i, k]), _map(rank, [*lead, k, j]), _map(rank, [*lead, i, j])]
    iterators = ["parallel"] * (len(lead) + 1) + ["reduction", "parallel"]
    inputs = f"{left}, {right} : {left_type}, {right_type}"
    return _generic(maps, iterators, inputs, f"{out} : {out_type}", "\n".join(lines), out_type)


def copies_to_linalg(text: str) -> str:
    """memref.copy would become a call of MLIR's runtime library; a linalg.copy becomes loops."""
    return re.sub(
        rf"memref\.copy {VALUE}, {VALUE} : {SHAPED} to {SHAPED}", r"linalg.copy ins(\1 : \3) outs(\2 : \4)", text
    )


VECTORS = {"x86-64-v4": 32, "x86-64-v3": 16}
"""Columns of a matrix product that are summed at a time, in 4 rows: as many sums as a machine's registers hold."""


def products_to_vectors(text: str, cpu: str) -> str:
    """Bufferised float products, which ``matmuls_to_loops`` made, as loops over blocks of the result, summed in
    registers. LLVM leaves the sums in memory, and the columns of a narrow tile scalar.

    Each element sums over k in order, as before. A product whose rows or columns do not fit stays as it is.
    """
    shape = r"memref<((?:\d+x)+)(\w+)>"
    product = re.compile(
        r'linalg\.generic \{indexing_maps = \[[^\]]*\], iterator_types = \[((?:"parallel", )?)"parallel", "reduction", '
        rf'"parallel"\]\}} ins\({VALUE}, {VALUE} : {shape}, {shape}\) outs\({VALUE} : {shape}\) \{{\n(.*?)\n\s*\}}',
        re.S,
    )
    found = iter(range(len(text)))
    return product.sub(lambda match: _blocks(match, f"%product{next(found)}_", VECTORS.get(cpu, 8)), text)


def _blocks(match: re.Match, q: str, widest: int) -> str:
    """One product [rows, length] x [length, columns] as loops; ``q`` begins the names of its values."""
    left, right, left_shape, left_kind, right_shape, right_kind, out, out_shape, kind, body = match.groups()[1:]
    *batch, rows, columns = map(int, out_shape.split("x")[:-1])
    length = left_shape.split("x")[-2]
    across = next((width for width in (32, 16, 8, 4) if width <= widest and columns % width == 0), 0)
    down = next(step for step in (4, 2, 1) if rows % step == 0)
    if FUSED not in body or not across:
        return match[0]
    left_type, right_type, out_type = f"{left_shape}{left_kind}", f"{right_shape}{right_kind}", f"{out_shape}{kind}"
    vector, given = f"vector<{across}x{kind}>", f"vector<{across}x{right_kind}>"
    block, at = range(down), f"{q}g, " if batch else ""
    counts = {"zero": 0, "one": 1, "rows": rows, "columns": columns, "length": length, "down": down, "across": across}
    lines = [f"{q}{name} = arith.constant {n} : index" for name, n in (counts | {f"r{r}": r for r in block}).items()]
    if batch:
        lines.append(f"{q}batch = arith.constant {batch[0]} : index")
        lines.append(f"scf.for {q}g = {q}zero to {q}batch step {q}one {{")
    lines.append(f"scf.for {q}i = {q}zero to {q}rows step {q}down {{")
    lines.append(f"scf.for {q}j = {q}zero to {q}columns step {q}across {{")
    for r in block:
        lines.append(f"{q}i{r} = arith.addi {q}i, {q}r{r} : index")
        lines.append(f"{q}before{r} = vector.load {out}[{at}{q}i{r}, {q}j] : memref<{out_type}>, {vector}")
    sums = ", ".join(f"{q}sum{r} = {q}before{r}" for r in block)
    types = ", ".join([vector] * down)
    lines.append(f"{q}all:{down} = scf.for {q}k = {q}zero to {q}length step {q}one iter_args({sums}) -> ({types}) {{")
    lines.append(f"{q}b = vector.load {right}[{at}{q}k, {q}j] : memref<{right_type}>, {given}")
    wide = right_kind != kind
    if wide:
        lines.append(f"{q}bw = arith.extf {q}b : {given} to {vector}")
    for r in block:
        lines.append(f"{q}a{r} = memref.load {left}[{at}{q}i{r}, {q}k] : memref<{left_type}>")
        if left_kind != kind:
            lines.append(f"{q}aw{r} = arith.extf {q}a{r} : {left_kind} to {kind}")
        lines += [
            f"{q}av{r} = vector.broadcast {q}a{'w' * (left_kind != kind)}{r} : {kind} to {vector}",
            f"{q}p{r} = arith.mulf {q}av{r}, {q}b{'w' * wide} {FUSED} : {vector}",
            f"{q}next{r} = arith.addf {q}sum{r}, {q}p{r} {FUSED} : {vector}",
        ]
    lines += [f"scf.yield {', '.join(f'{q}next{r}' for r in block)} : {types}", "}"]
    for r in block:
        lines.append(f"vector.store {q}all#{r}, {out}[{at}{q}i{r}, {q}j] : memref<{out_type}>, {vector}")
    return "\n".join([*lines, "}", "}", *(["}"] if batch else [])])


def limit_unrolling(dialect: str) -> str:
    """Unrolling for the loops of matrix products alone.

    Tiles are loops of known length. Unrolling the innermost loop makes a product twice as fast; unrolling the others
    changes little and takes LLVM ten times as long.
    """

    def annotate(block: re.Match) -> str:
        return block[0] if FUSED in block[0] else f"{block[0]} {NO_UNROLLING}"

    block_with_jump = r"^(?:(?!\s*\^bb|\s*llvm\.br).*\n)*\s*llvm\.br \^bb\d+(?:\(.*\))?$"
    return re.sub(block_with_jump, annotate, dialect, flags=re.M)


def to_assembly(dialect: str, cpu: str, optimise: bool) -> str:
    """LLVM dialect to assembly; malloc, calloc and free become the launcher's arena."""
    from triton._C.libtriton import ir, llvm

    def with_triple(match: re.Match) -> str:
        return f'module attributes {{llvm.target_triple = "{TRIPLE}"' + (", " if match[1] else "} ")

    dialect = re.sub(r"^module( attributes \{)?", with_triple, dialect, count=1, flags=re.M)
    dialect = limit_unrolling(dialect)
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write(dialect)
        file.flush()
        context = ir.context()
        ir.load_dialects(context)
        module = ir.parse_mlir_module(file.name, context)
        module.context = context
        llvm.init_targets()
        native = llvm.to_module(module, llvm.context())
    llvm.attach_datalayout(native, TRIPLE, cpu, "")
    if optimise:
        llvm.optimize_module(native, llvm.OPTIMIZE_O3, cpu, "", [], False)
    else:
        os.environ["DISABLE_LLVM_OPT"] = "1"  # read where instructions are chosen
    try:
        assembly = llvm.translate_to_asm(str(native), TRIPLE, cpu, "", [], False, False)
    finally:
        os.environ.pop("DISABLE_LLVM_OPT", None)
    return re.sub(r"\b(malloc|calloc|free)@PLT\b", r"emulator_\1@PLT", assembly)
