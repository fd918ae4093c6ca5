"""A case: one problem, a call of this library that solves it, and the other contestants."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mla_kernels import hopper
from mla_kernels.device.machine import is_hopper

OURS = "mla_kernels"
INVARIANT, PORTABLE, HOPPER = "batch_invariant=True", "portable kernel", "Hopper kernel"
"""Names of variants."""
HOPPER_OPS = (
    "mla_decode", "sparse_mla_decode", "sparse_mla_prefill", "mla_prefill", "indexer_logits", "paged_indexer_logits",
    "select_keys", "select_slots", "fused_moe", "fused_experts",
)  # fmt: skip
"""Public functions with kernels in :mod:`mla_kernels.hopper`."""
KINDS = {
    "ours": "this library as a user calls it",
    "peer": "another implementation of the same problem, on the same tensors",
    "unpaged": "the same, but it reads keys in a row where ours follows pages: beside for scale",
    "other": "a peer on another format of the same numbers: beside for scale",
    "own": "another form of this library: bf16 beside a quantised format",
    "variant": "the same call of this library, bound to another promise or another kernel",
}
"""What a contestant is. The best peer is sought among those of kind "peer"."""

Call = Callable[[int], Any]
"""A contestant's call; the number chooses the copy of the inputs that it reads, so that L2 is cold."""


@dataclass(frozen=True)
class Contestant:
    """One that solves the problem.

    ``exact`` and ``pick`` are the problem's where they are None: what the picked part of the result of ``call(0)`` must
    be near, relative to its norm, by ``limit``.
    """

    call: Call
    kind: str = "peer"
    exact: Callable[[], torch.Tensor] | None = None
    pick: Callable[[Any], torch.Tensor] | None = None
    limit: float | None = None


@dataclass
class Problem:
    """What :func:`mla_kernels.device.measure.measure` checks and times."""

    ours: Call
    exact: Callable[[], torch.Tensor]
    """The right values, in float32 or float64, of what ``pick`` takes of a result."""
    pick: Callable[[Any], torch.Tensor] = lambda result: result
    others: dict[str, Contestant] = field(default_factory=dict)
    limit: float = 2e-2
    bytes: float = 0.0
    """Compulsory bytes: each input and each output once."""
    flops: float = 0.0
    copies: int = 1
    """How many copies of the inputs there are."""
    graph: bool = True
    """Whether it is timed in a CUDA graph; gradients are timed eagerly."""
    host: bool = False
    """Whether the host's time of an eager call is taken, too."""
    reset: Callable[[], Any] | None = None
    """Clears what calls write to, before the call whose result is checked."""

    def add(self, name: str, call: Call | None, kind: str = "peer", **more) -> None:
        """Enter a contestant, if there is one."""
        if call is not None:
            self.others[name] = Contestant(call, kind, **more)

    def contestants(self) -> dict[str, Contestant]:
        return {OURS: Contestant(self.ours, "ours")} | self.others


@dataclass(frozen=True)
class Case:
    """``build(place, peers)`` makes the tensors and gives the problem; ``family`` is a word of ``--only``.

    Goals, not measurements: ``asked``: beginning of contestants' names -> what the time of the fastest of these over
    ours should be at least (1.0: as fast, 0.97: at most 3% slower; beside our own bf16 what fewer bytes should bring);
    ``asked_mean``: what the mean of its group's ratios to the best peer should be at least, 0 where nothing is asked.
    """

    name: str
    family: str
    group: str
    priority: int
    build: Callable[..., Problem]
    asked: Mapping[str, float] = field(default_factory=dict)
    asked_mean: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where the tensors of a case lie, and how large they are.

    ``tiny`` sizes are for values on a CPU. Without ``values`` tensors are left as they are: over a driver that does
    nothing true sizes cost neither time nor memory.
    """

    device: str = "cuda"
    tiny: bool = False
    values: bool = True

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def normal(self, *shape: int, dtype=torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        made = torch.empty(*shape, dtype=dtype, device=self.device)
        return made.normal_(0, scale) if self.values else made

    def weight(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """bf16 numbers, over the stub driver too: something may be computed from them there."""
        return torch.empty(*shape, device=self.device).normal_(0, scale).bfloat16()

    def uniform(self, *shape: int, low: float = 0.0) -> torch.Tensor:
        return torch.rand(*shape, device=self.device) + low

    def ints(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, torch.int32).contiguous()

    def order(self, count: int) -> torch.Tensor:
        return torch.randperm(count, device=self.device)

    def copies(self, nbytes: float, most: int = 16) -> int:
        """How many copies of inputs of so many bytes no L2 holds together."""
        return 2 if self.tiny else max(1, min(most, math.ceil(160e6 / nbytes)))


def accepts(function: Callable, keyword: str) -> bool:
    """Whether a public function has this keyword."""
    return keyword in inspect.signature(function).parameters


def variants(
    problem: Problem, function: Callable, call: Callable[..., Call], place: Place, carried: bool = True
) -> Problem:
    """Enter the variants that ``function`` has; ``call(**more)`` gives a contestant's call with more keywords.

    ``batch_invariant=True`` where the function takes it; on Hopper the portable kernel and the Hopper kernel, each by
    name, where there is one and the form of the call is ``carried``.
    """
    if accepts(function, "batch_invariant"):
        problem.add(INVARIANT, call(batch_invariant=True), "variant")
    if carried and function.__name__ in HOPPER_OPS and on_hopper(place):
        plain = call()
        for name, mode in ((PORTABLE, "portable"), (HOPPER, "force")):
            problem.add(name, _within(hopper.variants, mode, plain), "variant")
    return problem


def on_hopper(place: Place) -> bool:
    """Whether kernels are launched, or over the stub driver compiled, for capability 9.0."""
    if not place.gpu:
        return not place.values
    return is_hopper()


def _within(block: Callable, mode: str, call: Call) -> Call:
    def run(copy: int):
        with block(mode):
            return call(copy)

    return run
