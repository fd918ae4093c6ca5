"""What a run leaves: one JSON object with card, date, versions, command and every case; and figures made of such."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mla_kernels.device.case import HOPPER, KINDS, OURS

FORMAT = 1
ABOUT = ("card", "driver", "date", "versions", "command", "method", "peers", "missing", "parity", "skipped", "notes")
"""What stands beside the cases."""
OF_A_CASE = {"family": str, "group": str, "case": str, "contestants": list, "problem": str}
NUMBERS = ("us", "low_us", "host_us", "error", "limit", "ratio")


def finish(about: Mapping, cases: Iterable[Mapping]) -> dict:
    """The JSON object: ``about`` and the cases, with each contestant's time over ours as its ``ratio``."""
    made = {"format": FORMAT} | {name: about.get(name) for name in ABOUT} | {"cases": []}
    for case in cases:
        ours = next((c["us"] for c in case["contestants"] if c["name"] == OURS and "us" in c), None)
        contestants = [
            contestant | ({"ratio": round(contestant["us"] / ours, 4)} if ours and "us" in contestant else {})
            for contestant in case["contestants"]
        ]
        made["cases"].append(dict(case) | {"contestants": contestants})
    problems = wrong_with(made)
    if problems:
        raise ValueError("; ".join(problems))
    return made


def wrong_with(result: object) -> list[str]:
    """What a result lacks of its form, in words; empty where it has it."""
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        return [f"format {result.get('format') if isinstance(result, dict) else None!r}: {FORMAT} is accepted"]
    wrong = [f"{name} is missing" for name in (*ABOUT, "cases") if name not in result]
    wrong += [f"{name} is no text" for name in ("card", "date", "command") if not isinstance(result.get(name), str)]
    wrong += [f"{n} is no object" for n in ("versions", "peers", "missing") if not isinstance(result.get(n), dict)]
    for case in result.get("cases", ()):
        name = case.get("case")
        wrong += [f"{name}: {part} is no {kind.__name__}" for part, kind in OF_A_CASE.items()
                  if not isinstance(case.get(part), kind)]  # fmt: skip
        for one in case.get("contestants", ()):
            at = f"{name}, {one.get('name')}"
            if one.get("kind") not in (*KINDS, "unknown"):
                wrong.append(f"{at}: kind {one.get('kind')!r}")
            if "problem" in one and "us" in one:
                wrong.append(f"{at}: it has a problem, and was timed")
            wrong += [
                f"{at}: {number} is {one[number]!r}"
                for number in NUMBERS
                if number in one and not (isinstance(one[number], int | float) and math.isfinite(one[number]))
                and not (number == "error" and "problem" in one)
            ]  # fmt: skip
    return wrong


def read(path: Path) -> dict:
    """A result that was kept; ValueError names the file and what is wrong with it."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    problems = wrong_with(result)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems[:3])}")
    return result


def write(result: Mapping, path: Path) -> None:
    """One line a contestant, so that two runs can be compared line by line."""
    head = {name: value for name, value in result.items() if name != "cases"}
    lines = [json.dumps(head, indent=1)[:-2] + ',\n "cases": [']
    for number, case in enumerate(result["cases"]):
        rest = {name: value for name, value in case.items() if name != "contestants"}
        contestants = ",\n   ".join(json.dumps(one) for one in case["contestants"])
        comma = "," if number + 1 < len(result["cases"]) else ""
        lines.append(f'  {json.dumps(rest)[:-1]}, "contestants": [\n   {contestants}]}}{comma}')
    path.write_text("\n".join([*lines, " ]\n}\n"]))


def forms_that_ran(result: Mapping) -> list[dict]:
    """Entries for the list of Hopper kernels that are launched by default (``mla_kernels.hopper.RAN``): the forms whose
    results were right, of the kernels all of whose parity tests passed (:func:`mla_kernels.device.parity.sure`). None
    that was launched in a group of cases in one of which the Hopper kernel was wrong or broke (cases of several groups
    launch a form: forward alone, and with its backward)."""
    sure = (result["parity"] or {}).get("hopper", ())
    broken, found = set(), {}
    about = {"card": result["card"], "date": result["date"]}
    about |= {name: result["versions"].get(name) for name in ("torch", "triton")}
    for case in result["cases"]:
        for one in case["contestants"]:
            refused = one.get("problem", "").startswith("NotImplementedError")
            if one["name"] == HOPPER and "problem" in one and not refused:
                broken.add(case["group"])
            for entry in one.get("forms", ()):
                _, groups = found.setdefault(json.dumps(entry, sort_keys=True), (entry | about, set()))
                groups.add(case["group"])
    return [entry for entry, groups in found.values() if groups.isdisjoint(broken) and entry["kernel"] in sure]


def timed(case: Mapping, kind: str, name: str = "") -> list[dict]:
    """The contestants of this kind, and of this name if one is given, that were timed beside ours; fastest first."""
    found = [c for c in case["contestants"] if c["kind"] == kind and "ratio" in c and name in ("", c["name"])]
    return sorted(found, key=lambda one: one["us"])


@dataclass(frozen=True)
class Asked:
    """What a case, or a group's mean, was asked for: ``beside`` whom, and the ``least`` ratio. ``ratio`` is that of
    the call as it is, ``hopper`` that of the Hopper kernel; None where one was not timed (of a mean: in each of its
    cases)."""

    case: str
    beside: str
    least: float
    ratio: float | None
    hopper: float | None

    @property
    def said(self) -> str:
        if self.ratio is not None and self.ratio >= self.least:
            return "reached"
        if self.hopper is not None and self.hopper >= self.least:
            return "reached by the Hopper kernel"
        return "not timed" if self.ratio is None else "missed"


def asked(result: Mapping) -> list[Asked]:
    """What the cases of a result were asked for, and the means of their groups. Of contestants whose names begin as the
    case says the fastest counts."""
    found, means = [], {}
    for case in result["cases"]:
        for name, least in case.get("asked", {}).items():
            times = [c["us"] for c in case["contestants"] if c["name"].startswith(name) and "us" in c]
            found.append(Asked(case["case"], name, least, *_ratios(case, min(times, default=None))))
        if case.get("asked_mean"):
            best = (timed(case, "peer") or [{}])[0].get("us")
            means.setdefault((case["group"], case["asked_mean"]), []).append(_ratios(case, best))
    for (group, least), ratios in means.items():
        known = [ratio for ratio in ratios if ratio[0] is not None]
        mean = [None if None in column else math.exp(sum(map(math.log, column)) / len(known)) for column in zip(*known)]
        cases = f"{len(known)} of {len(ratios)} cases"
        found.append(Asked(f"mean of {group}, {cases}", "the best peer", least, *(mean or (None, None))))
    return found


def _ratios(case: Mapping, us: float | None) -> tuple[float | None, float | None]:
    """This time over ours, and over the Hopper kernel's."""
    times = {c["name"]: c["us"] for c in case["contestants"] if c["name"] in (OURS, HOPPER) and "us" in c}
    return tuple(us / times[name] if us and name in times else None for name in (OURS, HOPPER))


def summary(result: Mapping, kind: str, name: str = "") -> dict[str, tuple[int, float, float, float]]:
    """Group -> number of cases, least, geometric mean and most of the fastest one's ratio; arguments as timed's."""
    ratios: dict[str, list[float]] = {}
    for case in result["cases"]:
        found = timed(case, kind, name)
        if found:
            ratios.setdefault(case["group"], []).append(found[0]["ratio"])
    return {
        group: (len(values), min(values), math.exp(sum(map(math.log, values)) / len(values)), max(values))
        for group, values in ratios.items()
    }
