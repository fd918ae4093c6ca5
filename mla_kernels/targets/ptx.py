"""What a Gluon kernel's PTX must keep of its warps, which the emulator does not model: barriers and registers.

Gluon speaks of a *partition* (warps that work as one), PTX of threads. Between the two the compiler chooses who arrives
on an mbarrier, where a partition's warps wait for each other, and which registers they are dealt. Read from the PTX,
along every path:

- a thread arrives or starts a TMA copy only where its partition's warps have met since they last read or wrote shared
  memory, or waited for a wgmma: it speaks for all of them, and each of them was done by itself;
- one thread does, one expects bytes, and every thread that copied by cp.async arrives, without being counted twice;
- mbarriers are made known to the asynchronous units before anything uses them;
- each partition has a named barrier of its own, of as many threads as it has;
- registers at launch fit a multiprocessor, and what partitions are dealt fits what there was at launch: else a
  partition waits for registers for ever.

Imports nothing of the package, so that a compiler process can load it as a plain file.
"""

import re
from typing import NamedTuple

REGISTERS = 65536  # of a multiprocessor
_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"^(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_GUARD = re.compile(r"^@!?%p\d+\s+")
_TOUCHES = {
    "st.shared": "a store", "stmatrix": "a store", "ld.shared": "a load", "ldmatrix": "a load",
    "wgmma.wait_group": "a product",
}  # fmt: skip
_SAYS = {"mbarrier.arrive.expect_tx": "bytes are expected", "mbarrier.arrive": "a thread arrives",
         "cp.async.bulk": "a TMA copy starts"}  # fmt: skip
_WORK = {"outside": "met", "sent": "idle", "dealt": "working", "to lead": "leading"}
"""Where a path is behind a barrier of all threads, of which two begin and two end a partition's work: before the first
it is outside; a path that has met then reads which partition it is (sent) or leads, and takes its registers."""


class _State(NamedTuple):
    """Of a path: what its warp did since its partition met, whether mbarriers were made that are not yet known, where
    it is (see _WORK), the instruction that dealt its partition registers, and how many."""

    since: frozenset = frozenset()
    unknown: bool = False
    part: str = "outside"
    dealer: int = 0
    registers: int = 0


def problems(text: str) -> list[str]:
    """What a kernel's PTX does not keep, in words; empty if it keeps all."""
    program = _parse(text)
    _, dealt = _walk(program, frozenset())
    found, _ = _walk(program, frozenset(dealer for dealer, _, barrier in dealt if barrier))
    return sorted(found) + _misdealt(text, dealt)


def _walk(program: tuple, wide: frozenset) -> tuple[set[str], set[tuple[int, int, str]]]:
    """(what is not kept, (who dealt, registers, the barrier where the partition meets or "")) along every path.

    ``wide``: dealers of partitions of several warps, which a barrier of a warp does not bring together.
    """
    instructions, labels, targets = program
    found: set[str] = set()
    dealt: set[tuple[int, int, str]] = set()
    seen: set[tuple[int, _State]] = set()
    paths = [(0, _State())]
    while paths:
        place = paths.pop()
        if place in seen or place[0] >= len(instructions):
            continue
        seen.add(place)
        index, state = place
        line = instructions[index]
        state = _step(index, line, state, found)
        met = re.match(r"bar(?:rier)?(\.warp)?\.sync\s+(.*)", line)
        if met:
            state = _meet(state, *met.groups(), wide, found, dealt)
        branch = _BRANCH.match(line)
        if branch:
            paths.append((labels[branch.group(2)], state))
        if line.startswith("brx.idx"):
            paths += [(labels[target], state) for target in targets]
        elif not line.startswith("ret") and not (branch and not branch.group(1)):
            paths.append((index + 1, state))
    return found, dealt


def _parse(text: str) -> tuple[list[str], dict[str, int], list[str]]:
    """Instructions without those of a wait's loop, where labels stand among them, and what an indirect jump reaches."""
    instructions, labels = [], {}
    body = text[text.index("\n{") :]
    table = re.search(r"\.branchtargets\s+([^;]*);", body)
    for line in body.split("\n"):
        line = line.split("//")[0].strip().rstrip(";")
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
        elif line and line[0] not in ".${}" and not re.search(r"waitLoop|skipWait|:$|^\$", line):
            instructions.append(line)
    return instructions, labels, re.findall(r"\$L__BB\w+", table.group(1)) if table else []


def _step(index: int, line: str, state: _State, found: set) -> _State:
    """The state behind an instruction."""
    name, guarded = _GUARD.sub("", line), line.startswith("@")
    touched = [what for prefix, what in _TOUCHES.items() if name.startswith(prefix)]
    if touched:
        state = state._replace(since=state.since | {*touched})
        if name.startswith("ld.shared.b8") and state.part == "met":
            return state._replace(part="sent")  # reads which partition it is
    if name.startswith("mbarrier.init"):
        if not guarded:
            found.add("an mbarrier is initialised by every thread")
        return state._replace(unknown=True)
    if name.startswith("fence.proxy.async"):
        return state._replace(unknown=False)
    said = next((what for prefix, what in _SAYS.items() if name.startswith(prefix)), "")
    copied = name.startswith("cp.async.mbarrier.arrive")
    if copied and (guarded or ".noinc" not in name):
        found.add("threads that copied do not all arrive, or are counted twice")
    if said and not guarded:
        found.add(f"{said} for every thread")
    if (said or copied) and state.unknown:
        found.add("an mbarrier is used before its initialisation is fenced")
    if said and state.since and "expect_tx" not in name:
        found.add(f"{said} behind {' and '.join(sorted(state.since))}, before the partition's warps have met")
    if name.startswith("setmaxnreg"):
        part = {"sent": "dealt", "met": "to lead"}.get(state.part, state.part)
        return state._replace(part=part, dealer=index, registers=int(name.split()[-1]))
    return state


def _meet(state: _State, warp, barrier: str, wide: frozenset, found: set, dealt: set) -> _State:
    """Behind a barrier: of a warp, of a partition (its number and threads), or of all threads."""
    if warp:
        alone = state.part == "working" and state.dealer not in wide
        return state._replace(since=frozenset()) if alone else state
    if state.part in ("working", "leading"):
        dealt.add((state.dealer, state.registers, "" if barrier == "1" else barrier))
    if barrier == "1":
        if state.unknown:
            found.add("partitions start before the initialisation of mbarriers is fenced")
        state = state._replace(part=_WORK.get(state.part, "outside"))
    return state._replace(since=frozenset())


def _misdealt(text: str, dealt: set) -> list[str]:
    """What is wrong with registers and named barriers."""
    threads = int(re.search(r"\.reqntid (\d+)", text).group(1))
    limit = re.search(r"\.maxnreg (\d+)", text)
    if not limit or not dealt:
        return []
    launched, found = int(limit.group(1)) * threads, []
    if launched > REGISTERS:
        found.append(f"{threads} threads of {limit.group(1)} registers; a multiprocessor has {REGISTERS}")
    named = [(registers, *map(int, barrier.split(", "))) for _, registers, barrier in dealt if barrier]
    numbers = [number for _, number, _ in named]
    if len(set(numbers)) < len(numbers) or 1 in numbers:
        found.append(f"named barriers {sorted(numbers)} of partitions; 1 is that of all threads")
    meet = {dealer for dealer, _, barrier in dealt if barrier}
    single = {registers for dealer, registers, _ in dealt if dealer not in meet}  # warps, and what fills up their group
    rest = threads - sum(count for _, _, count in named)
    total = sum(registers * count for registers, _, count in named) + rest * max(single, default=REGISTERS)
    if total > launched:
        found.append(f"partitions are dealt {total} registers of {launched}")
    return found
