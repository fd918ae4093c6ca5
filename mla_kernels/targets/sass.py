"""NVIDIA machine code as ``cuobjdump -sass`` prints it: instructions, their classes, loops, traps.

Imports nothing of the package, so that a compiler process can load it as a plain file.
"""

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)(?:\s*[?&][^\s;]+)*\s*;"
    r"\s*(?:/\* 0x([0-9a-f]{16}) \*/)?\s*$"
)
_ADDRESS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/")
_UPPER_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")

_KINDS = {
    "tensor": "HMMA HGMMA QMMA QGMMA IMMA IGMMA DMMA BMMA OMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA UTCMXQMMA",
    "tensor memory": "LDTM STTM UTCCP UTCSHIFT UTCATOMSWS",
    "async copy": "LDGSTS UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED UTMAPF UTMACMDFLUSH UTMACCTL",
    "load": "LDG LD",
    "constant": "LDC LDCU ULDC",
    "store": "STG ST RED REDG ATOM ATOMG",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM ATOMS",
    "spill": "LDL STL",
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 DADD DMUL DFMA",
    "special": "MUFU",
    "convert": "F2F F2FP F2I F2IP I2F I2FP FRND I2I",
    "multiply": "IMAD IMUL IDP",
    "shuffle": "SHFL REDUX CREDUX VOTE MATCH",
    "select": "SEL FSEL FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 HMNMX2",
    "compare": "FSETP FSET ISETP ICMP HSETP2 DSETP FCHK PLOP3 PSETP P2R R2P",
    "integer": "IADD IADD3 VIADD VIADDMNMX LEA LOP LOP3 SHF SHL SHR PRMT SGXT BMSK POPC FLO BREV IABS",
    "move": "MOV MOVM CS2R S2R S2UR R2UR UR2R",
    "sync": "BAR WARPSYNC SYNCS DEPBAR LDGDEPBAR MEMBAR FENCE WARPGROUP ARRIVES BSSY BSYNC UTCBAR ERRBAR CCTL ELECT",
    "control": "BRA BRX EXIT RET CALL NOP YIELD NANOSLEEP BREAK JMP KILL",
    "trap": "BPT",
}  # fmt: skip
_KIND_OF = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. ``control`` is the upper half of its encoding (stall count, barriers); 0 if unknown."""

    address: int
    predicate: str
    opcode: str  # with its modifiers, "HMMA.16816.F32.BF16"
    operands: str
    control: int = 0

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def parse(text: str) -> list[Instruction]:
    """Instructions in address order of the first function in the listing.

    CUDA 12.8's cuobjdump ends those of sm_120 in hints to the scheduler (``&req={3} ?trans8``), which say nothing here.

    Raises:
        ValueError: a line with an address that is no instruction: what it holds must not be overlooked.
    """
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if "Function :" in line and instructions:
            break
        match = _LINE.match(line)
        if match:
            address, predicate, opcode, operands, _ = match.groups()
            instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands))
            continue
        if _ADDRESS.match(line):
            raise ValueError(f"machine code: {line.strip()!r} is in no form that is known")
        upper = _UPPER_WORD.match(line)
        if upper and instructions:
            last = instructions[-1]
            instructions[-1] = Instruction(
                last.address, last.predicate, last.opcode, last.operands, int(upper.group(1), 16)
            )
    return instructions


def kind(instruction: Instruction) -> str:
    """Class of an instruction, by the unit that executes it; "uniform" and "other" for the rest."""
    known = _KIND_OF.get(instruction.name)
    return known or ("uniform" if instruction.name.startswith("U") else "other")


def _last_exit(instructions: list[Instruction]) -> int:
    """Index of the last EXIT (the end, without one). Behind it stand only slow paths of barriers and error handlers."""
    exits = [i for i, instruction in enumerate(instructions) if instruction.name == "EXIT"]
    return exits[-1] if exits else len(instructions)


def loops(instructions: list[Instruction]) -> list[tuple[int, ...]]:
    """Every loop, as the indices from the target of a backward branch to the branch. Two branches back to one place
    are one loop. The endless branch that pads a kernel's end is none, nor are branches behind the last EXIT."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    last = _last_exit(instructions)
    ends: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
        start = index.get(int(target.group(1), 16)) if target else None
        if start is not None and start < i and (i <= last or _closes(instructions, i, last)):
            ends[start] = max(i, ends.get(start, i))
    return [tuple(range(start, end + 1)) for start, end in sorted(ends.items())]


def _closes(instructions: list[Instruction], branch: int, last_exit: int) -> bool:
    """Whether a branch behind the last EXIT closes a loop of the body: the EXIT before it is a conditional one."""
    return branch == last_exit + 1 and bool(instructions[last_exit].predicate)


def traps(instructions: list[Instruction]) -> int:
    """Traps in a kernel's own code. Those behind the last EXIT are error handlers that ptxas adds on sm_100."""
    return sum(instruction.name == "BPT" for instruction in instructions[: _last_exit(instructions)])


def tensor_shapes(instructions: list[Instruction]) -> dict[str, int]:
    """Tensor instructions by opcode and shape, ``{"HMMA.16816": 8}``."""
    shapes: dict[str, int] = {}
    for instruction in instructions:
        if kind(instruction) == "tensor":
            shape = ".".join(instruction.opcode.split(".")[:2])
            shapes[shape] = shapes.get(shape, 0) + 1
    return shapes
