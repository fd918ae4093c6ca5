"""by_row: a CPU op made batch-invariant, by computing each row in a call of its own.

How torch's products add, and which lanes its vectorised operators leave to scalar code, follow from the shapes of a
call, from how threads share it, and from where its operands lie. A row that is computed alone, from a copy, has the
same shapes and the same alignment whatever it was beside. That costs what a batch saves.
"""

from collections.abc import Callable, Sequence

import torch


def by_row(function: Callable, *places: int) -> Callable:
    """``function`` with one more argument, batch_invariant. With it, rows are computed one by one: those of the
    arguments at ``places``, along their first dimension (None is left). Results are joined along theirs."""

    def run(*args):
        *args, batch_invariant = args
        return each(function, args, places) if batch_invariant else function(*args)

    return run


def each(function: Callable, args: Sequence, places: Sequence[int]):
    """``function`` called for each row by itself, on copies of it."""
    rows = args[places[0]].shape[0]
    if rows == 0:
        return function(*args)
    results = []
    for row in range(rows):
        own = list(args)
        for place in places:
            if args[place] is not None:
                own[place] = copied(args[place][row : row + 1])
        results.append(function(*own))
    return joined(results)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy, which begins where torch's allocator begins every tensor."""
    return tensor.clone(memory_format=torch.contiguous_format)


def joined(results: list):
    """Tensors, or tuples of them, one after another along their first dimension; None if there is nothing."""
    if results[0] is None:
        return None
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*results))
    return torch.cat(results)
