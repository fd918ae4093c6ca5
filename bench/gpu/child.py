"""The process that measures: a JSON object a line in, JSON objects out. It may fault or hang; its parent goes on.

<- {"loading": "FlashMLA"}   before each peer; then {"ready": true, "versions": ..., "missing": ...}
-> {"case": "decode h128 b64 4k", "skip": ["FlashMLA"]}
<- {"begin": "mla_kernels", "kind": "ours"}   before each step, "" for the case's tensors
<- {"bytes": ..., "flops": ...}               then {"contestant": {...}}, as measure.py makes them
<- {"end": true, "problem": ""}   or why the case could not be built; {"fault": "..."} is the last line
"""

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from mla_kernels import launch
from mla_kernels.device import cases, peers
from mla_kernels.device.case import Case, Place
from mla_kernels.device.clock import GpuClock, first_line
from mla_kernels.device.measure import DeviceFault, launch_all, measure, still_works

FAULT = 3
"""Exit status where the device's context is broken."""


def speaker() -> Callable[..., None]:
    """A function that says what the parent hears; what a library prints goes where errors go."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**words) -> None:
        out.write(json.dumps(words) + "\n")
        out.flush()

    return say


def serve(known: Iterable[Case], place: Place, others: peers.Peers, clock, warm: bool, say: Callable) -> int:
    """Answer requests until there are no more."""
    by_name = {case.name: case for case in known}

    def begin(name: str, kind: str) -> None:
        say(begin=name, kind=kind)

    say(ready=True, versions=others.versions, missing=others.missing)
    for line in sys.stdin:
        request = json.loads(line)
        case = by_name[request["case"]]
        torch.manual_seed(0)
        if warm:
            records = launch_all(case, place, others, request["skip"], begin)
        else:
            records = measure(case, place, others, clock, request["skip"], begin)
        try:
            say(end=True, problem=_told(records, say, clock))
        except DeviceFault as fault:
            say(fault=str(fault))
            return FAULT
        records = None
        gc.collect()
        if place.gpu:
            torch.cuda.empty_cache()
    return 0


def _told(records: Iterator[dict], say: Callable, clock) -> str:
    """Say each record of a case; why the case itself could not be built, or ""."""
    try:
        for record in records:
            say(**({"contestant": record} if "name" in record else record))
    except DeviceFault:
        raise
    except Exception as error:  # its tensors: too large for this card, or refused by it
        still_works(clock)
        return first_line(error)
    return ""


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m mla_kernels.device.child")
    options.add_argument("--place", choices=("cuda", "tiny", "stub"), required=True)
    options.add_argument("--warm", action="store_true", help="only call everything once")
    options.add_argument("--peers", type=Path)
    options.add_argument("--without", action="append", default=[], metavar="PEER")
    options.add_argument("--tiles-of", default="h100", help="with --place stub: the device whose tiles are launched")
    chosen = options.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    place = Place("cuda" if chosen.place == "cuda" else "cpu", chosen.place == "tiny", chosen.place != "stub")
    clock, say = None, speaker()
    how = {"without": chosen.without, "begin": lambda name: say(loading=name)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if chosen.place == "cuda":
            others = peers.load(chosen.peers, device_name=torch.cuda.get_device_name(), **how)
            clock = GpuClock()
        elif chosen.place == "stub":
            from mla_kernels.device import stub

            stub.pose(stack, chosen.tiles_of)
            others = peers.load(chosen.peers, device_name=stub.device_name(chosen.tiles_of), stub=True, **how)
        else:
            stack.enter_context(launch.on_cpu("torch"))
            others = peers.Peers()
        return serve(cases.CASES, place, others, clock, chosen.warm, say)


if __name__ == "__main__":
    sys.exit(main())
