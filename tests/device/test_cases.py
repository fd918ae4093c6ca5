"""Every case of the device benchmark at tiny sizes on the CPU: values, and what its check would catch."""

import contextlib
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mla_kernels.device.case import KINDS, OURS, Case, Contestant, Place, Problem, variants
from mla_kernels.device.cases import CASES, FAMILIES
from mla_kernels.device.measure import error_of, launch_all, measure
from mla_kernels.device.peers import Peers

TINY, STUB = Place("cpu", tiny=True), Place("cpu", values=False)
pytestmark = [pytest.mark.usefixtures("cpu_code")]


def contestants(case, problem, **more):
    """Records of the contestants of a problem, by name."""
    made = measure(replace(case, build=lambda place, peers: problem), TINY, Peers(), None, **more)
    return {record["name"]: record for record in made if "name" in record}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one a group", "every"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_at_tiny_sizes(family, every):
    """All are right; and one value of those looked at, halved, makes a contestant wrong."""
    first_of = {case.group: case for case in reversed(FAMILIES[family])}
    for case in FAMILIES[family] if every else first_of.values():
        problem = case.build(TINY, Peers())
        found = contestants(case, problem)
        assert found.keys() == problem.contestants().keys() and OURS in found
        for name, record in found.items():
            assert "problem" not in record, f"{case.name}, {name}: {record}"
            assert record["kind"] in KINDS and record["error"] <= record["limit"]
        spoilt = {name: replace(one, pick=_spoilt(problem, one)) for name, one in problem.contestants().items()}
        ours = spoilt.pop(OURS)
        found = contestants(case, replace(problem, others=spoilt | {"ours, spoilt": ours}), skip=[OURS])
        for name, record in found.items():
            assert record["problem"].startswith("WRONG: error "), f"{case.name}, {name}: {record}"


def _spoilt(problem: Problem, contestant: Contestant):
    def pick(result):
        picked = (contestant.pick or problem.pick)(result).clone()
        picked.view(-1)[picked.abs().argmax()] *= 0.5
        return picked

    return pick


def test_a_call_that_writes_nothing_is_wrong():
    """What another contestant wrote before does not stand for it."""
    for case in FAMILIES["latent"]:
        problem = case.build(TINY, Peers())
        if not case.name.startswith("mla_prolog"):
            stale = problem.ours(0)
            problem.add("writes nothing", lambda copy, stale=stale: stale)
            assert contestants(case, problem)["writes nothing"]["problem"].startswith("WRONG: error 1.00e+00")


def test_gradients_of_rotated_parts_are_looked_at():
    """Those of the queries' last columns, and that of the rotated key, which all heads share."""
    case = next(case for case in FAMILIES["prefill"] if "fwd+bwd" in case.name)
    problem = case.build(TINY, Peers())
    for place, columns in ((0, slice(-64, None)), (3, slice(None))):
        gradients = [gradient.clone() for gradient in problem.ours(0)]
        gradients[place][..., columns] = 0
        problem.add("without", lambda copy, gradients=gradients: gradients)
        assert contestants(case, problem)["without"]["problem"].startswith("WRONG: error ")


def test_names_and_priorities():
    names = Counter(case.name for case in CASES)
    assert max(names.values()) == 1 and len(names) >= 130
    priorities = [case.priority for case in CASES]
    assert priorities == sorted(priorities) and set(priorities) == {0, 1, 2}
    assert {case.family for case in CASES if case.priority == 0} == FAMILIES.keys()
    decode = {case.name for case in FAMILIES["decode"]}
    assert {f"decode h{h} b{b} {k}k" for h in (128, 64, 16) for b in (1, 4, 16, 64, 128) for k in (4, 16)} < decode


class Clock:
    """Counts whom it times."""

    def __init__(self):
        self.timed = []

    def synchronise(self):
        pass

    def graph(self, call, copies):
        from mla_kernels.device.clock import Times

        self.timed.append(call)
        return Times(10.0, 9.0, True)

    def host_us(self, call, us):
        return 3.0


def test_errors():
    exact = torch.tensor([3.0, -4.0, 0.0])
    assert error_of(exact, exact) == 0 and error_of(exact + torch.tensor([0.0, 0.0, 1.0]), exact) == 0.25
    many = torch.ones(10_000)
    one_wrong = many.clone()
    one_wrong[5] = 2.0
    assert error_of(one_wrong, many) == 1.0 and error_of(many * 1.01, many) == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(error_of(torch.tensor([3.0, float("nan"), 0.0]), exact))


def test_who_is_wrong_or_raises_is_not_timed():
    def raises(copy):
        raise RuntimeError("no kernel for this card\nand a second line")

    right, wrong = (lambda copy: torch.ones(3)), (lambda copy: torch.tensor([1.0, 1.0, float("nan")]))
    problem = Problem(right, lambda: torch.ones(3), bytes=8, flops=9, host=True)
    problem.add("wrong", wrong)
    problem.add("raises", raises)
    problem.add("other shape", lambda copy: torch.ones(4))
    problem.add("own exact values", lambda copy: torch.zeros(3) + 2, exact=lambda: torch.full((3,), 2.0))
    problem.add("not there", None)
    clock, told = Clock(), []
    case = Case("a case", "decode", "decode, bf16", 0, lambda place, peers: problem)
    head, *records = measure(case, TINY, Peers(), clock, begin=lambda name, kind: told.append((name, kind)))
    assert head == {"bytes": 8.0, "flops": 9.0}
    found = {record["name"]: record for record in records}
    assert clock.timed == [right, problem.others["own exact values"].call]
    assert found[OURS] == dict(
        name=OURS, kind="ours", error=0.0, limit=0.02, us=10.0, low_us=9.0, graph=True, host_us=3.0
    )
    assert found["wrong"]["problem"] == "WRONG: error nan, at most 2e-02 is right" and "us" not in found["wrong"]
    assert found["raises"]["problem"] == "RuntimeError: no kernel for this card"
    assert "[4]" in found["other shape"]["problem"]
    assert told[:2] == [("", ""), (OURS, "ours")] and "not there" not in found


def test_variants(monkeypatch):
    """Entered where the function has them, and called with what they are named after."""
    calls, forced = [], []

    def op(x, *, batch_invariant=False):
        calls.append((batch_invariant, tuple(forced)))

    def plain(x):
        pass

    class Hopper:
        @contextlib.contextmanager
        def variants(mode):
            forced.append(mode)
            yield
            forced.pop()

    def entered(function, place=STUB):
        problem = Problem(lambda copy: None, lambda: None)
        return variants(problem, function, lambda **more: lambda copy: function(1, **more), place).others

    assert entered(plain) == {} and list(entered(op)) == ["batch_invariant=True"]
    monkeypatch.setattr("mla_kernels.device.case.HOPPER_OPS", ("op",))
    monkeypatch.setattr("mla_kernels.device.case.hopper", Hopper)
    found = entered(op)
    assert list(found) == ["batch_invariant=True", "portable kernel", "Hopper kernel"] and entered(plain) == {}
    assert list(entered(op, TINY)) == ["batch_invariant=True"]  # the CPU's code has no such kernel
    assert {one.kind for one in found.values()} == {"variant"}
    for one in found.values():
        one.call(0)
    assert calls == [(True, ()), (False, ("portable",)), (False, ("force",))] and not forced


def test_launching_all_calls_everything_once():
    case = next(case for case in CASES if case.name == "route v3 t1")
    assert [record["name"] for record in launch_all(case, TINY, Peers())] == [OURS, "batch_invariant=True", "torch"]
    assert [record["name"] for record in launch_all(case, TINY, Peers(), [OURS])] == ["batch_invariant=True", "torch"]
    no_values = Place("cpu", tiny=True, values=False)
    assert [record["name"] for record in launch_all(case, no_values, Peers())] == [OURS, "batch_invariant=True"]
