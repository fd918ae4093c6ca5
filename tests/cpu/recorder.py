"""What a function does to torch: how many operators it calls, and the largest tensor that it allocates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """``operators`` called and ``largest_bytes`` of a result that is not a view of an argument."""

    def __init__(self):
        super().__init__()
        self.operators, self.largest_bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        owned = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in owned:
                self.largest_bytes = max(self.largest_bytes, leaf.untyped_storage().nbytes())
        return result


def record(function, *args) -> Recorder:
    with Recorder() as recorder:
        function(*args)
    return recorder
