"""What is said to have the same bits on every chip has them on every backend, and the published table is current."""

import importlib.metadata
import json
import math
from pathlib import Path

import pytest
import torch

import mla_kernels as mk
from mla_kernels import launch
from mla_kernels.__main__ import main
from mla_kernels.agreement import command, compare, run, table
from mla_kernels.catalogue import EVERY
from tests.support import not_on
from tests.test_batch_invariance import functions

PAGE = Path(__file__).parents[1] / "docs/agreement.md"
DTYPES = command.DEFAULT_DTYPES
ELSEWHERE = {"convert_cache", "quantisation_error"}
"""Functions without a row, as the page says."""

EXACT = run.rows([op for op, call in EVERY.items() if call.exact], DTYPES)
COMPOSED = "prefill_rows"


def rows_of(text: str) -> dict[tuple[str, str, str], list[str]]:
    """(op, inputs, result and its dtype) -> cells, of the first table in a text."""
    found, op = {}, ""
    for line in text[text.index(table.START) : text.index("Largest of")].splitlines():
        if line.startswith("| ") and not line.startswith(("| op", "| ---")):
            first, inputs, result, *cells = (part.strip() for part in line.strip("|").split("|"))
            op = first or op
            found[op, inputs, result] = cells
    return found


def page_rows():
    return rows_of(PAGE.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The claims


def check_exact(op, dtype, backend):
    want, got = run.results(op, dtype, "cpu"), run.results(op, dtype, backend)
    for name in EVERY[op].exact:
        assert compare.differing(*(one[name].view(torch.uint8) for one in (want, got))) == 0, (name, dtype)


@not_on("is what the others are compared with", "cpu")
@not_on("has a test of its own: cases of one test take turns", "npu-emulated")
@pytest.mark.no_launch("made of torch's operators", when=lambda op: op == COMPOSED)
@pytest.mark.parametrize(("op", "dtype"), EXACT)
def test_the_same_bits(backend, op, dtype):
    check_exact(op, dtype, backend)


@pytest.mark.no_launch("made of torch's operators", when=lambda op: op == COMPOSED)
@not_on("see above", "cpu", "interpret", "cuda", "npu")
@pytest.mark.parametrize(("op", "dtype"), EXACT)
def test_the_same_bits_in_the_npu_emulator(backend, op, dtype):
    check_exact(op, dtype, backend)


def on_both(device, call, *tensors):
    """What a call gives on the CPU code, and on this backend."""
    with launch.on_cpu("torch"):
        want = call(*tensors)
    return want, call(*(tensor.to(device) for tensor in tensors)).cpu()


@not_on("is what the others are compared with", "cpu")
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("groups", [1, 4])
def test_routers_break_exact_ties_alike(device, scoring, groups):
    """Few different logits, far apart: nearly every choice is between equal scores. No sum of two group scores equals
    another one but by the same terms."""
    logits = torch.tensor([0.0, 1.0, 3.0])[torch.randint(0, 3, (40, 32))]
    options = {"scoring": scoring, "num_groups": groups, "top_k_groups": max(1, groups // 2)}
    want, got = on_both(device, lambda x: mk.route(x, 5, **options)[1], logits)
    assert torch.equal(want, got)
    if groups == 1:
        assert torch.equal(want, logits.sort(dim=1, descending=True, stable=True).indices[:, :5].int())


@not_on("is what the others are compared with", "cpu")
def test_the_indexer_breaks_exact_ties_alike(device):
    logits = torch.randint(-2, 3, (24, 70)).float()
    want, got = on_both(device, lambda x: mk.indexer_topk(x, 9), logits)
    assert torch.equal(want, got)


@not_on("is what the others are compared with", "cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_that_are_exact_in_any_order_give_the_same_logits_and_choices(device, dtype):
    """Products and sums of small integers, weighted by powers of two."""
    q, k = torch.randint(-2, 3, (17, 4, 32)).to(dtype), torch.randint(-2, 3, (40, 32)).to(dtype)
    weights = torch.tensor([0.25, 0.5, 1.0])[torch.randint(0, 3, (17, 4))]
    starts, ends = torch.zeros(17, dtype=torch.int32), torch.arange(20, 37, dtype=torch.int32)
    inputs = (q, k, weights, starts, ends)
    want, got = on_both(device, mk.indexer_logits, *inputs)
    assert torch.equal(want, got)
    want, got = on_both(device, lambda *tensors: mk.select_keys(*tensors, 6), *inputs)
    assert torch.equal(want, got)


@not_on("is what the others are compared with", "cpu")
def test_paged_scores_that_are_exact_give_the_same_slots(device):
    keys = torch.randint(-2, 3, (24, 4, 32)).bfloat16()
    q, weights = torch.randint(-2, 3, (3, 2, 4, 32)).bfloat16(), torch.full((3, 2, 4), 0.5)
    blocks, lengths = torch.randperm(24, dtype=torch.int32).view(3, 8), torch.tensor([32, 7, 19], dtype=torch.int32)

    def call(keys, *tensors):
        cache = mk.IndexerCache(keys.clone(), 32, "bf16")
        return mk.select_slots(tensors[0], cache, *tensors[1:], 5)

    want, got = on_both(device, call, keys, q, weights, blocks, lengths)
    assert torch.equal(want, got)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_has_a_row_for_every_function():
    named = {word for op, _, _ in page_rows() for word in op.split()}
    assert functions() - named == ELSEWHERE
    assert all(f"`{name}`" in PAGE.read_text() for name in ELSEWHERE)


def test_the_pages_rows_are_what_the_command_gives():
    """Its rows by the CPU code; "=" wherever equality is claimed; and nowhere more than the parity tests accept."""
    wanted = run.rows(list(EVERY), DTYPES)
    rows = table.compared({"cpu": {f"{op}|{dtype}": run.results(op, dtype, "cpu") for op, dtype in wanted}})
    known = page_rows()
    assert list(known) == list(rows_of(table.markdown(ABOUT, rows)))
    for (op, _, result), cells in known.items():
        seen = [cell for cell in cells if cell != "not run"]
        assert len(seen) >= 3, op
        if result.startswith("**"):
            assert set(seen) == {"="}, op
        elif result.endswith(("fp32", "bf16")):
            assert all(cell == "=" or float(cell) <= {"32": 84, "16": 4}[result[-2:]] for cell in seen), op
        else:
            assert set(seen) == {"="}, f"{op}: {result}, which the page says of all ids"


CHEAP = ("dispatch", "permute", "merge_states", "unpermute", "hyper_post", "scatter_tokens", "indexer_topk")


def test_cheap_rows_are_what_the_command_gives():
    """In the interpreter: equal where the page says so, and elsewhere an ulp more or less on any CPU."""
    wanted = run.rows(CHEAP, DTYPES)
    found = {
        backend: {f"{op}|{dtype}": run.results(op, dtype, backend) for op, dtype in wanted}
        for backend in ("cpu", "interpret")
    }
    known = page_rows()
    for name, cells in rows_of(table.markdown(ABOUT, table.compared(found))).items():
        own, published = (0.0 if cell == "=" else float(cell) for cell in (cells[0], known[name][0]))
        assert abs(own - published) <= (0 if name[2].startswith("**") else 1), name


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_ulps_are_those_of_the_largest_magnitude():
    one = torch.tensor([5.3, 0.0, -1.0])
    assert compare.ulps(one, one + torch.tensor([0.0, 2.0**-21, 0.0])) == 1
    assert compare.ulps(one.bfloat16(), one.bfloat16() + torch.tensor([4 * 2.0**-7, 0, 0]).bfloat16()) == 1
    assert compare.ulps(one.half(), one.half() + torch.tensor([0, 2.0**-8, 0]).half()) == 1
    assert compare.ulps(torch.tensor([0.0]), torch.tensor([-0.0])) == 0 and compare.ulps(one[:0], one[:0]) == 0


def test_ulps_of_what_is_not_finite():
    inf, nan = torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0])
    assert compare.ulps(inf, inf) == 0 and compare.ulps(nan, nan) == 0
    for other in (-inf, nan, torch.tensor([3e38, 1.0]), torch.tensor([0.0, 1.0])):
        assert math.isinf(compare.ulps(inf, other)) and math.isinf(compare.ulps(other, inf))
    assert math.isinf(compare.ulps(nan, torch.tensor([0.0, 1.0])))


def test_what_cannot_be_compared():
    with pytest.raises(TypeError, match=r"other: got dtype torch.float32, accepted is that of one: torch.bfloat16"):
        compare.ulps(torch.zeros(2).bfloat16(), torch.zeros(2))
    with pytest.raises(TypeError, match="one: got dtype int32, accepted: float32, bfloat16, float16"):
        compare.ulps(torch.zeros(2).int(), torch.zeros(2).int())
    with pytest.raises(ValueError, match=r"other: got shape \(3,\), accepted is that of one: \(2,\)"):
        compare.differing(torch.zeros(2).int(), torch.zeros(3).int())


def test_an_unequal_claim_and_a_nan_are_named():
    rows = [
        row("dispatch", "order", "int32", True, {"cpu|interpret": 2.0}),
        row("route", "ids", "int32", False, {"cpu|interpret": 2.0}),
        row("mla_decode", "out", "float32", False, {"cpu|npu-emulated": math.inf}),
    ]
    assert table.broken(rows) == [
        "dispatch: order: 2 of 72 differ between cpu and interpreter",
        "mla_decode: out: a NaN or infinity in one between cpu and NPU emulator",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The command

ABOUT = {"date": "2026-11-29", "tokens": 24, "machine": "a CPU", "backends": ["cpu"], "versions": {"torch": "2.15.0"}}


def row(op, result, dtype, exact, distances):
    names = {"op": op, "inputs": "", "result": result, "dtype": dtype, "exact": exact}
    return names | {"values": 72, "distances": distances}


def test_columns_of_a_device_come_from_a_record(tmp_path):
    rows = [row("dispatch", "order", "int32", True, {"cpu|interpret": 0.0})]
    assert "| dispatch |  | **order** int32 | = |  |  | not run | not run |" in table.markdown(ABOUT, rows)
    on_card = [row("dispatch", "order", "int32", True, {"cpu|interpret": 3.0, "cpu|cuda": 0.0, "interpret|cuda": 0.0})]
    table.write(tmp_path / "cuda.json", ABOUT | {"cuda": "NVIDIA H200", "date": "2027-01-02"}, on_card)
    text = table.markdown(ABOUT, rows, [table.read(tmp_path / "cuda.json")])
    assert "interpreter : NPU emulator | cpu : CUDA card | interpreter : CUDA card | NPU |" in text
    assert "| dispatch |  | **order** int32 | = |  |  | = | = | not run |" in text
    assert "Columns of the NVIDIA H200: 2027-01-02, 24 tokens, torch 2.15.0, on a CPU." in text


def test_command(tmp_path, capsys):
    """Each backend in a process of its own."""
    assert main(["agree", "--op", "dispatch", "--backend", "cpu", "interpret", "--json", str(tmp_path / "a.json")]) == 0
    assert "| dispatch |  | **order** int32 | = |  |  | not run | not run |" in capsys.readouterr().out
    record = table.read(tmp_path / "a.json")
    assert record["about"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert [row["distances"] for row in record["rows"]] == [{"cpu|interpret": 0.0}] * 4


@pytest.fixture
def here(monkeypatch):
    """Backends run in this process, and one gives another result of ``dispatch``."""

    def everywhere(wanted, backends, tokens, done):
        found = {backend: {f"{op}|{dtype}": run.results(op, dtype, "cpu") for op, dtype in wanted}
                 for backend in backends}  # fmt: skip
        found["interpret"]["dispatch|"]["order"][0] += 1
        return found

    monkeypatch.setattr(run, "everywhere", everywhere)
    monkeypatch.setattr(run, "present", lambda: ["cpu", "interpret"])


def test_a_broken_claim_is_exit_status_1_and_a_page_is_rewritten(here, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    assert main(["agree", "--markdown", str(page)]) == 1
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| dispatch |  | **order** int32 | 1 of 48 differ |  |  | not run | not run |" in text
    assert "not equal: dispatch: order: 1 of 48 differ between cpu and interpreter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "dispatsh"], "argument --op: invalid choice: 'dispatsh'"),
        (["--backend", "cpu"], "--backend: at least two are compared"),
        (["--backend", "cpu", "npu"], "--backend npu: torch sees no such device here"),
        (["--tokens", "1"], "'1': accepted are integers from 8 to 4096"),
        (["--tokens", "²"], "'²': accepted are integers from 8 to 4096"),
        (["--json", "nowhere/rows.json"], "'nowhere/rows.json': there is no folder 'nowhere'"),
        (["--json", "."], "'.' is a folder, a file is accepted"),
        (["--markdown", "{page}", "--op", "dispatch"], "--markdown FILE writes the whole table"),
        (["--markdown", "{page}"], "the document has no lines"),
        (["--markdown", "nowhere/page.md"], "No such file"),
        (["--record", "{page}"], "no record of python -m mla_kernels agree --json"),
        (["--record", "{other}"], "no record of python -m mla_kernels agree --json"),
    ],
)
def test_what_the_command_refuses(arguments, said, tmp_path, capsys):
    page, other = tmp_path / "page.md", tmp_path / "other.json"
    page.write_text("no markers\n")
    other.write_text(json.dumps({"about": {"date": "x"}, "rows": [{}]}))
    with pytest.raises(SystemExit) as end:
        main(["agree", *(text.format(page=page, other=other) for text in arguments)])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_missing_compiler_is_exit_status_2(monkeypatch, capsys):
    def missing(kind):
        raise command.service.ToolchainMissing("no triton-ascend")

    monkeypatch.setattr(command, "compiler_version", missing)
    assert main(["agree", "--op", "dispatch"]) == 2
    assert "no triton-ascend\nWithout it: --backend cpu interpret hopper-emulated" in capsys.readouterr().err
    assert main(["agree", "--op", "dispatch", "--backend", "cpu", "npu-emulated"]) == 2
    assert "Without it: --backend cpu interpret\n" in capsys.readouterr().err  # two, as it takes no fewer


def test_a_backend_that_fails_says_so(monkeypatch):
    with pytest.raises(RuntimeError, match=r"cpu: [\s\S]*KeyError: 'no_op'"):
        run.everywhere([("no_op", "")], ["cpu"])
