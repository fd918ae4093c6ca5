"""The main loop of a disassembled kernel. Imports nothing, so that a compiler process can load it as a plain file.

A loop is the sorted tuple of the indices of its instructions; ``kinds`` gives the class of every instruction
(``"tensor"``, ``"spill"``, ``"load"``, ``"sync"``, ...), as :func:`mla_kernels.targets.sass.kind` and
:func:`mla_kernels.targets.amdgcn.kind` name it.
"""

from collections import Counter

_WAITING = {"sync", "control", "uniform"}

Loop = tuple[int, ...]


def main_loop(kinds: list[str], loops: list[Loop]) -> Loop:
    """The loop in which a kernel spends its time; empty for straight-line code.

    With tensor instructions: the loop that holds most of them, among those without an inner loop that has some too
    (the body of a persistent kernel is around such a loop, not in it). Without: the longest innermost loop. Loops that
    only wait for a barrier do not count.
    """
    loops = [loop for loop in loops if any(kinds[i] not in _WAITING for i in loop)]

    def tensors(loop):
        return sum(kinds[i] == "tensor" for i in loop)

    working = [loop for loop in loops if tensors(loop)] or loops
    innermost = [loop for loop in working if not any(set(other) < set(loop) for other in working)]
    return max(innermost, key=lambda loop: (tensors(loop), len(loop)), default=())


def mix(kinds: list[str], loop: Loop) -> dict[str, int]:
    """Instructions of ``loop`` by class, most frequent first."""
    return dict(Counter(kinds[i] for i in loop).most_common())
