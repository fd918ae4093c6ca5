"""``python -m mla_kernels device``: parity on the card, then every op beside its peers, in a given time."""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path

from mla_kernels import hopper
from mla_kernels.device import machine, parity, results, svg, table
from mla_kernels.device import queue as children
from mla_kernels.device.case import Case
from mla_kernels.device.cases import CASES, FAMILIES
from mla_kernels.device.peers import files

PARITY = "parity"
WORDS = (PARITY, *FAMILIES)
PARITY_SHARE = 0.35
"""Of the time, at most; kernels that the cases launch are compiled meanwhile, in other processes."""
HOPPER_SHARE = 0.6
"""Of the time for parity, that of the Hopper kernels: what passed there alone makes them the default."""
MOST_WARM = 4
LEAST_SECONDS = 20
METHOD = (
    "median of CUDA graphs of several calls on rotating copies of the inputs (cold L2), gradients eagerly; errors "
    "relative to float32 or float64, before any timing"
)


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m mla_kernels device", description=__doc__)
    made.add_argument(
        "--seconds", type=seconds, default=240.0, metavar="S", help=f"for all of it, from {LEAST_SECONDS} (default 240)"
    )
    made.add_argument(
        "--only", type=words, default=list(WORDS), metavar="A,B", help=f"of {', '.join(WORDS)} (default all)"
    )
    made.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds this")
    made.add_argument(
        "--peers", type=folder, metavar="FOLDER", help="what get_peers.py filled; no folder: what pip has"
    )
    made.add_argument("--output", type=Path, default=Path("device_results"), metavar="FOLDER",
                      help="of the JSON, the table, the picture and the log (default ./device_results)")  # fmt: skip
    made.add_argument("--json", action="store_true", help="print the result, or the plan without a GPU, as JSON alone")
    made.add_argument("--tiny", action="store_true", help="tiny sizes of every case on the CPU: checked, not timed")
    return made


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST_SECONDS <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are seconds from {LEAST_SECONDS} to 86400")
    return value


def words(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [word for word in chosen if word not in WORDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: accepted are {', '.join(WORDS)}")
    return chosen


def folder(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / files.MANIFEST).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} has no {files.MANIFEST}: python -m mla_kernels.device.get_peers {shlex.quote(text)} fills it"
        )
    return path


def chosen_cases(only: Sequence[str], part: str) -> list[Case]:
    return [case for case in CASES if case.family in only and part in case.name]


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a test failed, a result was wrong or ours was not timed; 2 where nothing could be measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = options()
    chosen = parser.parse_args(given)
    cases = chosen_cases(chosen.only, chosen.filter)
    if not cases and (chosen.filter or PARITY not in chosen.only):
        parser.error(f"--filter {chosen.filter!r}: no case of {', '.join(chosen.only)} has this in its name")
    if chosen.output.exists() and not chosen.output.is_dir():
        parser.error(f"--output {chosen.output}: this is no folder")
    say: Callable[..., None] = (lambda *text: None) if chosen.json else (lambda *text: print(*text, flush=True))
    if chosen.tiny:
        return tiny(cases, chosen, say)
    if not machine.has_gpu():
        return plan(cases, chosen, say)
    try:
        return measure(cases, chosen, say, shlex.join(["python", "-m", "mla_kernels", "device", *given]))
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {chosen.output}", file=sys.stderr)
        return 130


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU


def plan(cases: list[Case], chosen, say) -> int:
    """Say what would be run on a card."""
    found, missing = files.find(chosen.peers)
    why = parity.cannot()
    record = {
        "gpu": None, "why": machine.why_none(), "versions": machine.versions(), "seconds": chosen.seconds,
        "parity": why or "would be run" if PARITY in chosen.only else "not asked for", "peers": found,
        "missing": missing,
        "cases": [{"case": c.name, "family": c.family, "group": c.group, "priority": c.priority} for c in cases],
    }  # fmt: skip
    if chosen.json:
        print(json.dumps(record, indent=1))
        return 0
    say(f"No GPU here ({record['why']}): nothing was run. On a machine with one, this command runs, in this order:")
    if PARITY in chosen.only:
        say(
            f"- the parity suite on the card, at most {PARITY_SHARE * chosen.seconds:.0f} s"
            + (f": {why}" if why else "")
        )
    for family in dict.fromkeys(case.family for case in cases):
        groups: dict[str, list[str]] = {}
        for case in cases:
            if case.family == family:
                groups.setdefault(case.group, []).append(case.name)
        say(f"- {family}: {sum(map(len, groups.values()))} cases")
        for group, names in groups.items():
            say(f"    {group}: {', '.join(names)}")
    say(f"{len(cases)} cases, the most important of each family first; what {chosen.seconds:g} s do not hold is named.")
    say("Peers found: " + (", ".join(f"{name} ({version})" for name, version in found.items()) or "torch alone"))
    for name, reason in missing.items():
        say(f"Not found: {name}: {reason}")
    if missing:
        say(f"  {files.HOW}")
    say("--tiny checks tiny sizes of every case on this machine's CPU.")
    return 0


def tiny(cases: list[Case], chosen, say) -> int:
    """Check tiny sizes of every case on the CPU."""
    run = children.Run(
        lambda without: children.Child(children.command("tiny", None)), time.monotonic() + chosen.seconds,
        done=lambda record: say(line(record)),
    )  # fmt: skip
    run.all(cases)
    if chosen.json:
        print(json.dumps({"cases": run.records, "skipped": run.skipped}, indent=1))
    wrong = failures(run.records)
    say(
        f"{len(run.records)} cases on the CPU, checked and not timed; {len(wrong)} wrong; not begun: {len(run.skipped)}"
    )
    return int(bool(wrong)) if not run.broken else 2


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def measure(cases: list[Case], chosen, say, command: str) -> int:
    began = time.monotonic()
    deadline = began + chosen.seconds
    chosen.output.mkdir(parents=True, exist_ok=True)
    log = chosen.output / "device.log"
    log.write_text("")
    found, missing = files.find(chosen.peers)
    about = {
        "card": machine.card(), "driver": machine.driver(), "date": f"{date.today()}",
        "versions": machine.versions(), "command": command, "method": METHOD, "peers": found, "missing": missing,
        "parity": None, "skipped": [], "notes": [],
    }  # fmt: skip
    for text in table.heading(about):
        say(text)
    stops: list[Callable[[], object]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children go then, too
    first = children.Child(children.command("cuda", chosen.peers), log) if cases else None
    if first is not None:
        stops.append(first.stop)
    try:
        until = began + PARITY_SHARE * chosen.seconds
        about["parity"] = before_timing(cases, chosen, until, log, stops)
        if PARITY in chosen.only:
            for text in table.parity(about["parity"]):
                say(text)
        run = children.Run(
            lambda without: children.Child(children.command("cuda", chosen.peers, without=without), log), deadline,
            done=lambda record: (say(line(record)), keep(about, run, chosen.output)),
        )  # fmt: skip
        run.all(cases, first)
    finally:
        for stop in stops:
            stop()
        signal.signal(signal.SIGTERM, before)
    result = keep(about, run, chosen.output)
    if chosen.json:
        print(json.dumps(result, indent=1))
    say("\n".join(table.markdown(result).split("\n")[:-1]))
    count = len(results.forms_that_ran(result))
    if count:
        say(
            f"{count} forms of Hopper kernels were right here; the entries of {chosen.output / 'ran.json'}, added to "
            f"{hopper.RAN}, make them the default"
        )
    names = ", ".join(str(chosen.output / f"device.{end}") for end in ("json", "md", "svg", "log"))
    say(f"{len(run.records)} cases in {time.monotonic() - began:.0f} s; written: {names}")
    if run.broken:
        print(f"error: {run.broken}; its messages are in {log}", file=sys.stderr)
        return 2
    return int(bool(failures(run.records) or (about["parity"] or {}).get("failed")))


def before_timing(cases: list[Case], chosen, until: float, log: Path, stops: list) -> dict | None:
    """Until ``until``, or until both are done: the parity suite, and processes in which the cases' kernels compile."""
    warm = partial(children.command, "cuda", chosen.peers, "--warm")
    count = max(1, min(MOST_WARM, (os.cpu_count() or 1) // 4))
    parts = [cases[number::count] for number in range(count) if cases[number:]]
    runs = [children.Run(lambda without: children.Child(warm(without=without), log), until) for _ in parts]
    stops += [run.cancel for run in runs]
    threads = [threading.Thread(target=run.all, args=(part,), daemon=True) for run, part in zip(runs, parts)]
    for thread in threads:
        thread.start()
    found = suites(until, stops) if PARITY in chosen.only else None
    for thread in threads:
        thread.join()
    return found


def suites(until: float, stops: list) -> dict:
    """The parity suite and then, on Hopper, that of its own kernels, which time is left for."""
    why = parity.cannot()
    if why:
        return {"problem": why}
    left = until - time.monotonic()
    parts = [(parity.ROOMS, until)]
    if machine.is_hopper():
        parts = [(parity.ROOMS, until - HOPPER_SHARE * left), ((parity.HOPPER_ROOM,), until)]
    found = []
    for rooms, end in parts:
        suite = parity.Suite(rooms=rooms)
        stops.append(suite.finish)
        while suite.running() and time.monotonic() < end:
            time.sleep(0.1)
        stops.remove(suite.finish)
        found.append(suite.finish())
    return parity.together(found)


def line(record: dict) -> str:
    """A finished case, in a line."""
    name, ours, rates, best, others, problem = table.row(record)
    return f"{name:32} " + " | ".join(part for part in (ours, rates, best, others, problem) if part)


def failures(records: list[dict]) -> list[str]:
    """Cases in which a call of ours was not right, or broke; a variant may refuse a problem."""

    def failed(one: dict) -> bool:
        refused = one["kind"] == "variant" and one.get("problem", "").startswith("NotImplementedError")
        return one["kind"] in ("ours", "own", "variant") and "problem" in one and not refused

    return [record["case"] for record in records if any(map(failed, record["contestants"]))]


def keep(about: dict, run: children.Run, output: Path) -> dict:
    """Write the result as far as it is known."""
    loaded = {
        "peers": run.loaded.get("versions", about["peers"]),
        "missing": run.loaded.get("missing", about["missing"]),
    }
    notes = [run.broken] if run.broken else []
    result = results.finish(about | loaded | {"skipped": run.skipped, "notes": notes}, run.records)
    results.write(result, output / "device.json")
    (output / "ran.json").write_text(json.dumps(results.forms_that_ran(result), indent=1) + "\n")
    (output / "device.md").write_text(table.markdown(result))
    (output / "device.svg").write_text(svg.cases(result))
    return result
