"""Agreement: how the ranks of an expert-parallel group compare sizes, and learn why another rank does not answer."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import time
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist

MAX_CHUNKS = 16
TEXT_BYTES = 4096
MAX_VALUE = 200
LOOK_SECONDS = 1.0
"""How often a waiting rank looks whether another one has reported a failure."""

_REFUSED = -1  # in place of the checksum of sizes
_numbers: dict[str, itertools.count] = collections.defaultdict(itertools.count)
"""Numbers of the agreements of each group, by its name: members of a group make them in the same order."""


class Agreement:
    """Exchanges of one group, numbered alike on every rank, with reports of failure through torch.distributed's store.

    Ranks first exchange a checksum of their sizes together with their counts of rows, so that comparing costs no
    exchange of its own. Only if a checksum differs do they exchange the sizes themselves as text, and every rank
    raises the same error. A rank that fails anywhere else writes the reason into the store, where the ranks that wait
    for it look.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float):
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._prefix = f"mla_kernels/{group.group_name}/{next(_numbers[group.group_name])}"
        self.call, self._calls, self._reported = "", 0, False

    def agree(self, sizes: dict, counts: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Compare ``sizes`` and exchange ``counts`` [R, C] int64, the rows for each rank in each chunk.

        Returns the rows sent and received, ``[C][R]`` each. This waits for the device, once.

        Raises:
            ValueError: the ranks disagree. RuntimeError: one of them refused its arguments.
        """
        values = {name: str(value) for name, value in sizes.items()}
        sent, received = self._exchange(zlib.crc32(json.dumps(values).encode()), counts)
        if (received[:, 0] != sent[0, 0]).any():
            self._compare(json.dumps({name: _short(value) for name, value in values.items()}), counts.device)
        chunks = counts.shape[1]
        return sent[:, 1 : 1 + chunks].t().tolist(), received[:, 1 : 1 + chunks].t().tolist()

    def refuse(self, error: Exception, device: torch.device) -> None:
        """Take part in the exchange of sizes with a refusal, so that every rank hears of ``error`` at once."""
        self._exchange(_REFUSED, torch.zeros(self.size, 1, dtype=torch.int64, device=device))
        self._texts(json.dumps({"refused": _line(error)}), device)

    def wait(self, handle: dist.Work, what: str, device: torch.device, on_host: bool = False) -> None:
        """Wait for an exchange; on a device without ``on_host`` only its stream does, under the group's time-out."""
        if device.type != "cpu" and not on_host:
            handle.wait()
            return
        slices = LOOK_SECONDS if device.type == "cpu" else self.timeout  # NCCL ends an exchange that times out
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                handle.wait(timedelta(seconds=max(0.01, min(slices, left))))
                return
            except RuntimeError as error:
                late = device.type != "cpu" or not handle.is_completed()
                if late and left > slices and not self._failures():
                    continue
                raise self._explanation(what, error, late) from error

    @contextlib.contextmanager
    def reported(self, call: str | None = None):
        """What fails inside is written where the other ranks find it, under the name of the call, the same on every
        rank: a new number, or the one given."""
        if call is None:
            self._calls += 1
            call = str(self._calls)
        if call != self.call:
            self.call, self._reported = call, False
        try:
            yield
        except BaseException as error:
            self._report({"failed": _line(error)})
            raise

    def _exchange(self, checksum, counts):
        """What this rank sent and received, [R, 1 + MAX_CHUNKS] each, on the host."""
        row = counts.new_zeros(self.size, 1 + MAX_CHUNKS)
        row[:, 0] = checksum
        row[:, 1 : 1 + counts.shape[1]] = counts
        arriving = torch.empty_like(row)
        handle = dist.all_to_all_single(arriving, row, group=self.group, async_op=True)
        self.wait(handle, "the other ranks' sizes", row.device, on_host=True)
        return torch.stack([row, arriving]).cpu().unbind()

    def _texts(self, text, device):
        """Every rank's text, as JSON."""
        data = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
        row = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device).expand(self.size, -1).contiguous()
        arriving = torch.empty_like(row)
        handle = dist.all_to_all_single(arriving, row, group=self.group, async_op=True)
        self.wait(handle, "the other ranks' sizes", device, on_host=True)
        return [json.loads(bytes(line.tolist()).decode()) for line in arriving.cpu()]

    def _compare(self, text, device):
        every = self._texts(text, device)
        refused = {rank: sizes["refused"] for rank, sizes in enumerate(every) if "refused" in sizes}
        if refused:
            raise RuntimeError("; ".join(f"rank {rank} refused its arguments: {why}" for rank, why in refused.items()))
        differences = []
        for name in every[0]:
            values: dict[str, list[int]] = {}
            for rank, sizes in enumerate(every):
                values.setdefault(sizes[name], []).append(rank)
            if len(values) > 1:
                each = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items())
                differences.append(f"{name} ({each})")
        raise ValueError(f"the ranks must agree and disagree on {'; '.join(differences)}")

    def _explanation(self, what, error, late):
        """The error to raise for an exchange that did not happen."""
        self._report({"waited": what})
        failures, quiet = self._failures(), self._quiet()
        patience = time.monotonic() + min(2.0, self.timeout)
        while not failures and quiet and time.monotonic() < patience:
            time.sleep(0.05)
            failures, quiet = self._failures(), self._quiet()
        start = f"gave up after {self.timeout:g} s" if late and not failures else "stopped" if late else "was cut off"
        parts = [f"rank {self.rank} {start} waiting for {what}"]
        parts += [f"rank {rank} failed: {why}" for rank, why in failures.items()]
        if quiet and not failures:
            parts.append(f"no word from {_ranks(quiet)}, which ended or did not make this call")
        if not late:
            parts.append(_line(error))
        return (TimeoutError if late and not failures else RuntimeError)("; ".join(parts))

    def _report(self, report: dict) -> None:
        if not self._reported:
            self._reported = True
            with _lenient():
                _store().set(f"{self._prefix}/{self.call}/{self.rank}", json.dumps(report))

    def _others(self) -> dict[int, dict]:
        """What other ranks reported about this call."""
        found = {}
        with _lenient():
            for rank in range(self.size):
                key = f"{self._prefix}/{self.call}/{rank}"
                if rank != self.rank and _store().check([key]):
                    found[rank] = json.loads(_store().get(key))
        return found

    def _failures(self) -> dict[int, str]:
        return {rank: report["failed"] for rank, report in self._others().items() if "failed" in report}

    def _quiet(self) -> list[int]:
        known = self._others()
        return [rank for rank in range(self.size) if rank != self.rank and rank not in known]


def _store():
    return dist.distributed_c10d._get_default_store()


def _lenient():
    """The store is a courtesy: where it is gone, or torch has none, errors come without the other ranks' reasons."""
    return contextlib.suppress(AttributeError, RuntimeError)


def _short(value: str) -> str:
    """Few enough characters for several values in TEXT_BYTES; of different values still different ones."""
    if len(value) <= MAX_VALUE:
        return value
    return f"{value[: MAX_VALUE - 30]}... (checksum {zlib.crc32(value.encode()):08x})"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[: TEXT_BYTES // 8]


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
