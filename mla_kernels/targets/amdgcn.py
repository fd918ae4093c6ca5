"""AMD assembly as LLVM writes it: instructions, their classes, loops, registers.

Imports nothing of the package, so that a compiler process can load it as a plain file.
"""

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^(?:\.LBB(\w+):|; %bb\.\d+:)")
_HEADER = re.compile(r"Loop Header: Depth=")
_PARENT = re.compile(r"Parent Loop BB(\w+) Depth=")
_INSIDE = re.compile(r"in Loop: Header=BB(\w+) Depth=")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)\b\s*([^;]*)")
_METADATA = re.compile(r"^\s+(?:- )?\.(\w+):\s+(\d+)\s*$", re.MULTILINE)

_KINDS = (
    ("tensor", r"v_(s?mfma|wmma)_"),
    ("spill", r"scratch_"),
    ("async copy", r"(global|buffer)_load_(lds_|.*_lds)"),
    ("load", r"(global|buffer|flat)_load"),
    ("constant", r"s_(buffer_)?load"),
    ("store", r"(global|buffer|flat)_(store|atomic)"),
    ("shared load", r"ds_(read|load|consume)"),
    ("shuffle", r"ds_(b?permute|swizzle)|v_permlane|v_(read|write)lane|v_readfirstlane"),
    ("shared store", r"ds_"),
    ("trap", r"s_trap"),
    ("sync", r"s_(barrier|waitcnt|nop|sleep|setprio|sched)|buffer_(wbl2|inv)"),
    ("control", r"s_(cbranch|branch|endpgm|setpc|swappc|code_end)"),
    ("uniform", r"s_"),
    ("move", r"v_(mov|accvgpr)"),
    ("convert", r"v_cvt"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("float", r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|max|min|dot|max3|div|ldexp)\w*_(f|bf)\d+"),
    ("select", r"v_(cndmask|max|min)"),
    ("compare", r"v_cmp"),
    ("multiply", r"v_(mul|mad)"),
    ("integer", r"v_"),
)
_KINDS = tuple((name, re.compile(pattern)) for name, pattern in _KINDS)


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str


def parse(text: str) -> tuple[list[Instruction], list[tuple[int, ...]]]:
    """Instructions of the kernel, and its loops as sorted indices of their instructions.

    Loops come from the notes that LLVM writes beside every basic block ("in Loop: Header=BB0_3").
    """
    instructions: list[Instruction] = []
    loop_of: list[str] = []  # label of the innermost loop around each instruction
    parents: dict[str, str] = {}
    label, loop = "", ""
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        block = _BLOCK.match(line)
        if block:
            label, loop = block.group(1) or "", ""
        parent, inside = _PARENT.search(line), _INSIDE.search(line)
        if parent:
            parents[label] = parent.group(1)  # outer loops are named first, so the last one is the nearest
        if inside:
            loop = inside.group(1)
        if _HEADER.search(line):
            loop = label
        found = None if block else _INSTRUCTION.match(line)
        if found:
            instructions.append(Instruction(found.group(1), found.group(2).strip()))
            loop_of.append(loop)
    members: dict[str, list[int]] = {}
    for index, around in enumerate(loop_of):
        while around:
            members.setdefault(around, []).append(index)
            around = parents.get(around, "")
    return instructions, [tuple(indices) for indices in members.values()]


def kind(instruction: Instruction) -> str:
    """Class of an instruction; "other" for the rest."""
    return next((name for name, pattern in _KINDS if pattern.match(instruction.opcode)), "other")


def resources(text: str) -> dict[str, int]:
    """Numbers of the kernel's metadata: ``vgpr_count``, ``agpr_count``, ``vgpr_spill_count``, ``sgpr_spill_count``,
    ``private_segment_fixed_size``, ..."""
    metadata = text.partition(".amdgpu_metadata")[2]
    return {name: int(value) for name, value in _METADATA.findall(metadata)}


def tensor_shapes(instructions: list[Instruction]) -> dict[str, int]:
    """Tensor instructions by opcode and shape, ``{"v_mfma_f32_32x32x16_bf16": 24}``."""
    shapes: dict[str, int] = {}
    for instruction in instructions:
        if kind(instruction) == "tensor":
            shapes[instruction.opcode] = shapes.get(instruction.opcode, 0) + 1
    return shapes
