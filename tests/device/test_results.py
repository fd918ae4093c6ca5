"""What a run leaves: form, ratios, summary, table and picture; and the results that are kept in the repository."""

import copy
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mla_kernels.device import results, svg, table

KEPT = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))
ABOUT = {
    "card": "NVIDIA Test (capability 9.0)", "driver": "580.1", "date": "2026-01-02", "command": "python -m ...",
    "versions": {"mla_kernels": "0.1.0", "torch": "2.15.0"}, "method": "graphs", "peers": {"FlashMLA": "vllm 0.26.0"},
    "missing": {"DeepGEMM": "no nvcc"}, "parity": None, "skipped": ["decode h16 b1 16k"], "notes": ["a note"],
}  # fmt: skip


def case(name="decode h16 b1 4k", us=20.0, group="decode, bf16", **peers):
    """A case with ours and peers of these times."""
    contestants = [{"name": "mla_kernels", "kind": "ours", "error": 2e-3, "limit": 2e-2, "us": us, "graph": True}]
    contestants += [{"name": peer, "kind": "peer", "us": time, "graph": True} for peer, time in peers.items()]
    return dict(
        family=group.partition(",")[0],
        group=group,
        case=name,
        contestants=contestants,
        problem="",
        bytes=4e6,
        flops=8e6,
    )


@pytest.fixture
def result():
    wrong = {"name": "SGLang", "kind": "peer", "error": "nan", "limit": 2e-2, "problem": "WRONG: error nan"}
    own = {"name": "mla_kernels, bf16", "kind": "own", "us": 15.0, "host_us": 31.0, "graph": False}
    first, second = case(fast=10.0, slow=40.0), case("decode h16 b4 4k", 50.0, fast=100.0, slow=200.0)
    first["contestants"].append(wrong)
    third = case("int8 | x", 10.0, "decode, int8")
    third["contestants"] += [own, {"name": "batch_invariant=True", "kind": "variant", "us": 12.0, "graph": True}]
    return results.finish(ABOUT, [first, second, third])


def test_ratios_and_summary(result):
    assert [one.get("ratio") for one in result["cases"][0]["contestants"]] == [1.0, 0.5, 2.0, None]
    count, least, mean, most = results.summary(result, "peer")["decode, bf16"]
    assert (count, least, most) == (2, 0.5, 2.0) and mean == pytest.approx(1.0)
    assert results.summary(result, "own") == {"decode, int8": (1, 1.5, pytest.approx(1.5), 1.5)}


def test_forms_that_ran_right_become_entries_of_the_list():
    """Not where a case of their group was wrong, nor of a kernel whose parity tests have not all passed."""
    forms = [{"kernel": "k", "source": str(number), "form": {"LATENT": 512}} for number in range(3)]

    def hopper(name, group, number, **more):
        made = case(name, group=group)
        made["contestants"].append({"name": "Hopper kernel", "kind": "variant", "forms": [forms[number]]} | more)
        return made

    def entries(parity, *cases):
        about = ABOUT | {"parity": parity, "versions": {"torch": "2.11.0", "triton": "3.6.0"}}
        return results.forms_that_ran(results.finish(about, cases))

    right = {"passed": 9, "failed": ["tests/moe/test_route.py::test_x: no"], "not_run": [], "hopper": ["k"]}
    cases = [hopper("a", "decode", 0), hopper("b", "decode", 1), hopper("c", "sparse", 2)]
    refused = hopper("d", "decode", 0, forms=[], problem="NotImplementedError: it needs")
    found = entries(right, *cases, refused, hopper("e", "decode", 0))
    about = {"card": "NVIDIA Test (capability 9.0)", "date": "2026-01-02", "torch": "2.11.0", "triton": "3.6.0"}
    assert found == [form | about for form in forms]
    wrong = hopper("d", "decode", 0, forms=[], problem="WRONG: error nan")
    assert entries(right, *cases, wrong) == [forms[2] | about]
    assert entries(right, *cases, wrong, hopper("f", "decode and more", 0)) == [forms[2] | about]
    assert entries(right | {"hopper": ["another"]}, *cases) == []
    assert entries(None, *cases) == entries({"problem": "it needs pytest"}, *cases) == []


def test_what_is_asked_is_reached_missed_or_not_timed():
    """The fastest contestant whose name begins as asked counts, and the geometric mean of a group."""
    first = case(fast=10.0, slow=40.0) | {"asked": {"slow": 1.9, "fa": 0.6, "other": 1.0}, "asked_mean": 0.9}
    second = case("b", 20.0, fast=40.0) | {"asked": {"fast": 3.0}, "asked_mean": 0.9}
    second["contestants"].append({"name": "Hopper kernel", "kind": "variant", "us": 10.0, "graph": True})
    made = results.finish(ABOUT, [first, second])
    name = "decode h16 b1 4k"
    assert [(one.case, one.beside, one.ratio, one.hopper, one.said) for one in results.asked(made)] == [
        (name, "slow", 2.0, None, "reached"), (name, "fa", 0.5, None, "missed"),
        (name, "other", None, None, "not timed"),
        ("b", "fast", 2.0, 4.0, "reached by the Hopper kernel"),
        ("mean of decode, bf16, 2 of 2 cases", "the best peer", pytest.approx(1.0), None, "reached"),
    ]  # fmt: skip
    for one in (first, second):
        one["contestants"] = one["contestants"][:1]
    *_, mean = results.asked(results.finish(ABOUT, [first, second]))
    assert (mean.case, mean.ratio, mean.said) == ("mean of decode, bf16, 0 of 2 cases", None, "not timed")
    text = table.markdown(made)
    assert "3 of 5 reached." in text and f"| {name} | fa | 0.60 | 0.50 |  | missed |" in text
    assert f"| {name} | other | 1.00 |  |  | not timed |" in text
    assert "## Asked" not in table.markdown(results.finish(ABOUT, [case()]))


def test_without_our_time_there_is_no_ratio():
    broken = case(fast=10.0)
    broken["contestants"][0] = {"name": "mla_kernels", "kind": "ours", "problem": "DIED"}
    made = results.finish(ABOUT, [broken])
    assert results.summary(made, "peer") == {} and "| mla_kernels: DIED |" in table.markdown(made)


def test_written_and_read(result, tmp_path):
    path = tmp_path / "device.json"
    for one in (result, results.finish(ABOUT, [])):
        results.write(one, path)
        assert results.read(path) == json.loads(path.read_text()) == one


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda r: r.update(format=2), "format 2: 1 is accepted"),
        (lambda r: r.pop("driver"), "driver is missing"),
        (lambda r: r.update(card=None), "card is no text"),
        (lambda r: r["cases"][0].pop("group"), "group is no str"),
        (lambda r: r["cases"][0]["contestants"][0].update(kind="friend"), "kind 'friend'"),
        (lambda r: r["cases"][0]["contestants"][0].update(us=float("nan")), "us is nan"),
        (lambda r: r["cases"][0]["contestants"][0].update(problem="WRONG"), "it has a problem, and was timed"),
    ],
)
def test_other_forms_are_refused_by_the_files_name(result, spoil, words, tmp_path):
    spoilt = copy.deepcopy(result)
    spoil(spoilt)
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(spoilt))
    with pytest.raises(ValueError, match=r"spoilt\.json: ") as error:
        results.read(path)
    assert words in str(error.value)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"spoilt\.json: "):
        results.read(path)


def test_table(result):
    text = table.markdown(result)
    lines = text.splitlines()
    assert "- NVIDIA Test (capability 9.0), driver 580.1, 2026-01-02" in lines
    assert "- without DeepGEMM: no nvcc" in lines and "- parity: not run" in lines
    assert "| decode, bf16 | 2 | 1.00 (0.50, 2.00) |" in lines
    row = next(line for line in lines if line.startswith("| decode h16 b1 4k"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "decode h16 b1 4k", "mla_kernels 20.0", "200 GB/s, 0 TFLOP/s", "fast 10.0 (0.50)",
        "slow 40.0 (2.00); SGLang: WRONG: error nan", "",
    ]  # fmt: skip
    assert "| group | cases | the best peer, its time over ours: mean (least, most) |" in lines
    assert "| group | cases | batch_invariant=True, its time over ours: mean (least, most) |" in lines
    assert "| decode, int8 | 1 | 1.20 (1.20, 1.20) |" in lines
    assert "int8 \\| x" in text and "mla_kernels, bf16 15.0~ (1.50) host 31" in text
    assert lines[-1] == "Not begun for want of time: decode h16 b1 16k."


def test_parity_in_words():
    found = dict(
        backend="cuda", passed=3, failed=["tests/a.py::test_x[1]: assert False"], collected=7, seconds=12.3,
        not_run=["tests/a.py::test_y[1]", "tests/a.py::test_y[2]", "tests/b.py::test_z"],
    )  # fmt: skip
    assert table.parity(found) == [
        "parity on cuda: 3 passed, 1 failed, 3 of 7 did not run (12 s)",
        "failed: tests/a.py::test_x[1]: assert False",
        "did not run: tests/a.py::test_y, 2 cases",
        "did not run: tests/b.py::test_z, 1 case",
    ]
    assert table.parity({"problem": "no tests"}) == ["parity: no tests"]


def test_picture(result):
    root = ElementTree.fromstring(svg.cases(result))
    words = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"decode h16 b1 4k / fast", "decode h16 b4 4k / fast", "int8 | x / mla_kernels, bf16"} < set(words)
    circles = [float(circle.get("cx")) for circle in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert circles[0] < circles[2] < circles[1]
    ElementTree.fromstring(svg.cases(results.finish(ABOUT, [])))


def test_kept_results():
    """Each names its card, date and versions, and can be shown."""
    assert KEPT
    for path in KEPT:
        result = results.read(path)
        assert result["date"] in path.name and {"mla_kernels", "torch", "triton"} <= result["versions"].keys()
        assert result["card"] in table.markdown(result)
        ElementTree.fromstring(svg.cases(result))
