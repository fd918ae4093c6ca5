"""Lower bounds on the clocks of a loop on NVIDIA chips but sm_100, from its machine code: a model, not a measurement.

Each unit of an SM takes so many instructions, multiply-adds or bytes a clock. What one turn of the loop asks of a unit,
over that rate, is the unit's bound. ``core`` is the busiest unit's: all units overlap perfectly. ``serial`` is the
tensor cores' plus that of the busiest other unit: no overlap between the two. DRAM is left out.

Rates: NVIDIA's white papers and the CUDA C++ Programming Guide's table of arithmetic throughput, recalled; what
mma.sync reaches of wgmma's rate is a published measurement, recalled. They are those of workstation cards: GeForce
cards take products with sums in float32 at half the rate. sm_100, sm_103 and sm_110 start their matrix products with
instructions that do not name the shape; there is no bound for them.

Imports nothing of the package but the reader beside it, so that a compiler process can load it as a plain file.
"""

import re

import sass

_WARP_RATE = {  # warp instructions a clock and SM
    "issue": 4.0, "float": 4.0, "multiply": 2.0, "integer": 2.0, "special": 0.5, "shuffle": 1.0,
}  # fmt: skip
_WGMMA_RATE = 2048.0  # 16-bit multiply-adds a clock and SM
_MMA_SYNC_RATE = {"80": 1024.0, **dict.fromkeys(("86", "89", "120", "121"), 512.0), "90": 0.629 * _WGMMA_RATE}
ARCHITECTURES = tuple(_MMA_SYNC_RATE)
_SHARED_BYTES = 128.0  # shared memory a clock and SM
_WGMMA = re.compile(r"([HQI])GMMA\.(\d+)x(\d+)x(\d+)")
_MMA = re.compile(r"([HQI])MMA\.(168)(\d+)")
_OPERAND_BYTES = {"H": 2, "Q": 1, "I": 1}  # an element; the rate is in inverse proportion
_UNIT = {  # kind of instruction -> the unit it occupies, beside the issue slot
    "float": "float", "multiply": "multiply", "integer": "integer", "select": "integer", "compare": "integer",
    "move": "integer", "special": "special", "shuffle": "shuffle",
}  # fmt: skip


def bounds(loop: list["sass.Instruction"], warps: int, architecture: str = "90") -> dict[str, float]:
    """Clocks of one turn of the loop in a program of ``warps`` warps, unit by unit, with ``core`` and ``serial``.

    ``architecture`` is one of :data:`ARCHITECTURES`. ``multiply_adds`` is the matrix work that the program issues in a
    turn, for comparison with what the operation asks.
    """
    work = dict.fromkeys((*_WARP_RATE, "tensor", "shared"), 0.0)
    multiply_adds = 0.0
    for instruction in loop:
        kind = sass.kind(instruction)
        work["issue"] += warps
        if kind == "tensor":
            issued, clocks, operand_bytes = _matrix(instruction, warps, architecture)
            multiply_adds += issued
            work["tensor"] += clocks
            work["shared"] += operand_bytes
        elif kind in ("shared load", "shared store", "async copy", "spill"):
            work["shared"] += _bytes(instruction) * 32 * warps
        elif kind == "convert":  # packing two halves is an integer operation, other conversions are slow
            work["integer" if instruction.name == "F2FP" else "special"] += warps
        elif kind in _UNIT:
            work[_UNIT[kind]] += warps
    clocks = {unit: work[unit] / rate for unit, rate in _WARP_RATE.items()}
    clocks["float"] *= 2 if architecture == "80" else 1  # 64 lanes instead of 128
    clocks |= {"tensor": work["tensor"], "shared": work["shared"] / _SHARED_BYTES}
    others = max(value for unit, value in clocks.items() if unit != "tensor")
    core, serial = max(clocks.values()), clocks["tensor"] + others
    return {name: round(value, 1) for name, value in clocks.items()} | {
        "core": round(core, 1),
        "serial": round(serial, 1),
        "multiply_adds": multiply_adds,
    }


def _matrix(instruction: "sass.Instruction", warps: int, architecture: str) -> tuple[float, float, float]:
    """(multiply-adds, tensor clocks, operand bytes from shared memory) of all warps' executions of an instruction."""
    match = _WGMMA.match(instruction.opcode)
    if match:
        size = 4 if ".TF32" in instruction.opcode else _OPERAND_BYTES[match.group(1)]
        m, n, k = map(int, match.groups()[1:])
        groups = warps / 4
        from_registers = re.match(r"R\d+, R\d+, gdesc", instruction.operands)
        operands = size * k * (n if from_registers else n + m)
        return m * n * k * groups, m * n * k * groups * size / 2 / _WGMMA_RATE, operands * groups
    match = _MMA.match(instruction.opcode)
    if match:
        size = 4 if ".TF32" in instruction.opcode else _OPERAND_BYTES[match.group(1)]
        multiply_adds = 16 * 8 * int(match.group(3)) * warps
        return multiply_adds, multiply_adds * size / 2 / _MMA_SYNC_RATE[architecture], 0.0
    return 0.0, 0.0, 0.0


def _bytes(instruction: "sass.Instruction") -> int:
    """Bytes that one thread moves."""
    opcode = instruction.opcode
    if instruction.name in ("LDSM", "STSM"):
        matrices = re.search(r"\.(?:M88|MT88|x|16)\.?(\d)|\.([42])$", opcode)
        return 4 * int(next(filter(None, matrices.groups()))) if matrices else 4
    for suffix, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1), (".16", 2)):
        if suffix in opcode:
            return size
    return 4
