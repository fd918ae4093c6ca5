"""MLIR bodies for what triton-adapter leaves to a library: cumsum, cumprod, flip, gather, sort, histogram.

In the ttadapter IR they are calls to private functions without a body (``@triton_cumsum_0``) or, for the histogram, an
op of the closed part. Each becomes plain loops over ``tensor.extract`` and ``tensor.insert``.
"""

import re
from collections.abc import Callable

VALUE = r"(%[\w#\-]+)"
SHAPED = r"((?:tensor|memref)<[^<>]*(?:<[^<>]*>[^<>]*)*>)"
DECLARATION = re.compile(
    r"func\.func private @(triton_\w+)\(([^)]*)\)(?: -> (tensor<[^>]*>))?(?: attributes \{[^{}]*\})?"
)


class Unsupported(Exception):
    """A construct that the emulator has no meaning for."""


def _parts(shaped: str) -> tuple[str, str]:
    match = re.match(r"(?:tensor|memref)<((?:(?:\d+|\?)x)*)(\w+)", shaped)
    if match is None:
        raise Unsupported(f"type {shaped}")
    return match[1], match[2]


def extents(shaped: str) -> list[str]:
    """["16", "64"] of tensor<16x64xf32>."""
    return [extent for extent in _parts(shaped)[0].split("x") if extent]


def element(shaped: str) -> str:
    """f32 of tensor<16x64xf32>."""
    return _parts(shaped)[1]


def define_externals(text: str) -> str:
    """Give each bodiless ``@triton_*`` function a body; drop the declarations of print."""
    return DECLARATION.sub(lambda match: _define(text, match), text)


def _define(text: str, match: re.Match) -> str:
    name, result = match[1], match[3]
    kind = name.split("_")[1]
    if kind == "print":
        return ""
    if kind not in BODIES:
        raise Unsupported(f"external function @{name}")
    types = re.findall(r"tensor<[^>]*>|i\d+", match[2])
    extent = [int(e) for e in extents(result)]
    body = BODIES[kind](types, result, _constant_arguments(text, name))
    parameters = ", ".join(f"%x{i}: {kind}" for i, kind in enumerate(types))
    lines = [
        f"func.func private @{name}({parameters}) -> {result} {{",
        "%c0 = arith.constant 0 : index",
        "%c1 = arith.constant 1 : index",
        f"%empty = tensor.empty() : {result}",
    ]
    for axis, size in enumerate(extent):
        lines += [f"%n{axis} = arith.constant {size} : index", f"%last{axis} = arith.constant {size - 1} : index"]
    carried = "%empty"
    for axis in range(len(extent)):
        lines.append(
            f"%r{axis} = scf.for %i{axis} = %c0 to %n{axis} step %c1 iter_args(%a{axis} = {carried}) -> ({result}) {{"
        )
        carried = f"%a{axis}"
    lines.append(body([f"%i{axis}" for axis in range(len(extent))], carried))
    made = "%made"
    for axis in reversed(range(len(extent))):
        lines += [f"scf.yield {made} : {result}", "}"]
        made = f"%r{axis}"
    return "\n".join([*lines, f"return {made} : {result}", "}", ""])


def _constant_arguments(text: str, name: str) -> list[int | None]:
    """The call's arguments, as numbers where they are constants (axes and flags are)."""
    call = re.search(rf"call @{name}\(([^)]*)\)", text)
    if call is None:
        raise Unsupported(f"external function @{name} without a call")
    constants = dict(re.findall(r"(%[\w\-]+) = arith\.constant ([\w\-]+)", text))
    numbers = {key: {"true": 1, "false": 0}.get(value, value) for key, value in constants.items()}
    values = [numbers.get(argument.strip()) for argument in call[1].split(",")]
    return [int(value) if re.fullmatch(r"-?\d+", str(value)) else None for value in values]


def _at(indices: list[str], axis: int, index: str) -> str:
    return ", ".join(index if position == axis else own for position, own in enumerate(indices))


# A body takes (argument types, result type, constant arguments) and gives (loop indices, carried tensor) -> text of one
# step, which leaves the new tensor in %made.
Body = Callable[[list[str], str], str]


def _scan(operation: str):
    def make(types: list[str], result: str, constants: list[int | None]) -> Body:
        axis, reverse = constants[1], constants[2]
        kind = element(result)
        op = f"arith.{operation}{'f' if kind[0] in 'fb' else 'i'}"

        def body(indices: list[str], carried: str) -> str:
            i, last = f"%i{axis}", f"%last{axis}"
            if reverse:
                where = f"%cur = arith.subi {last}, {i} : index\n%up = arith.addi %cur, %c1 : index\n"
                where += f"%prev = arith.minsi %up, {last} : index\n"
            else:
                where = f"%cur = arith.addi {i}, %c0 : index\n%up = arith.subi %cur, %c1 : index\n"
                where += "%prev = arith.maxsi %up, %c0 : index\n"
            return (
                where + f"%first = arith.cmpi eq, {i}, %c0 : index\n"
                f"%v = tensor.extract %x0[{_at(indices, axis, '%cur')}] : {types[0]}\n"
                f"%p = tensor.extract {carried}[{_at(indices, axis, '%prev')}] : {result}\n"
                f"%s = {op} %p, %v : {kind}\n%w = arith.select %first, %v, %s : {kind}\n"
                f"%made = tensor.insert %w into {carried}[{_at(indices, axis, '%cur')}] : {result}"
            )

        return body

    return make


def _flip(types: list[str], result: str, constants: list[int | None]) -> Body:
    axis = constants[1]

    def body(indices: list[str], carried: str) -> str:
        return (
            f"%cur = arith.subi %last{axis}, %i{axis} : index\n"
            f"%v = tensor.extract %x0[{_at(indices, axis, '%cur')}] : {types[0]}\n"
            f"%made = tensor.insert %v into {carried}[{', '.join(indices)}] : {result}"
        )

    return body


def _gather(types: list[str], result: str, constants: list[int | None]) -> Body:
    axis = constants[2]

    def body(indices: list[str], carried: str) -> str:
        return (
            f"%k = tensor.extract %x1[{', '.join(indices)}] : {types[1]}\n"
            f"%cur = arith.index_cast %k : {element(types[1])} to index\n"
            f"%v = tensor.extract %x0[{_at(indices, axis, '%cur')}] : {types[0]}\n"
            f"%made = tensor.insert %v into {carried}[{', '.join(indices)}] : {result}"
        )

    return body


def _sort(types: list[str], result: str, constants: list[int | None]) -> Body:
    """Each element goes to its rank: the number of elements before it in order, ties by position."""
    axis, descending = constants[1], constants[2]
    kind = element(result)
    is_float = kind[0] in "fb"
    before = ("ogt" if descending else "olt") if is_float else ("sgt" if descending else "slt")
    compare = "arith.cmpf" if is_float else "arith.cmpi"

    def body(indices: list[str], carried: str) -> str:
        return (
            f"%v = tensor.extract %x0[{', '.join(indices)}] : {types[0]}\n"
            f"%rank = scf.for %j = %c0 to %n{axis} step %c1 iter_args(%q = %c0) -> (index) {{\n"
            f"%u = tensor.extract %x0[{_at(indices, axis, '%j')}] : {types[0]}\n"
            f"%less = {compare} {before}, %u, %v : {kind}\n"
            f"%same = {compare} {'oeq' if is_float else 'eq'}, %u, %v : {kind}\n"
            f"%left = arith.cmpi slt, %j, %i{axis} : index\n"
            "%tie = arith.andi %same, %left : i1\n%counts = arith.ori %less, %tie : i1\n"
            "%one = arith.index_castui %counts : i1 to index\n%q2 = arith.addi %q, %one : index\n"
            "scf.yield %q2 : index\n}\n"
            f"%made = tensor.insert %v into {carried}[{_at(indices, axis, '%rank')}] : {result}"
        )

    return body


BODIES = {
    "cumsum": _scan("add"),
    "cumprod": _scan("mul"),
    "flip": _flip,
    "gather": _gather,
    "sort": _sort,
}


def histogram(match: re.Match) -> str:
    """``hfusion.histogram`` as a loop; groups: result, values, bins, type of the values, type of the counts."""
    result, values, value_type, count_type = match[1], match[2], match[4], match[5]
    kind, length = element(count_type), extents(value_type)[0]
    q = "%q" + result[1:] + "_"  # prefix of fresh names
    return (
        f"{q}c0 = arith.constant 0 : index\n{q}c1 = arith.constant 1 : index\n{q}n = arith.constant {length} : index\n"
        f"{q}z = arith.constant 0 : {kind}\n{q}o = arith.constant 1 : {kind}\n{q}e = tensor.empty() : {count_type}\n"
        f"{q}f = linalg.fill ins({q}z : {kind}) outs({q}e : {count_type}) -> {count_type}\n"
        f"{result} = scf.for {q}i = {q}c0 to {q}n step {q}c1 iter_args({q}a = {q}f) -> ({count_type}) {{\n"
        f"{q}k = tensor.extract {values}[{q}i] : {value_type}\n"
        f"{q}j = arith.index_cast {q}k : {element(value_type)} to index\n"
        f"{q}v = tensor.extract {q}a[{q}j] : {count_type}\n{q}w = arith.addi {q}v, {q}o : {kind}\n"
        f"{q}r = tensor.insert {q}w into {q}a[{q}j] : {count_type}\nscf.yield {q}r : {count_type}\n}}"
    )
