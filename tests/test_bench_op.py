"""``python -m bench.op``: one op, in this tree and in an older one. Nothing here looks at a time's size."""

import json
import shutil
import subprocess
import tempfile

import pytest
import torch

from bench import op
from bench.op_cases import OPS, Make
from mla_kernels import launch
from tests.test_public_api import SIGNATURES

NAN = float("nan")


@pytest.fixture(scope="module")
def _repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "tree"
    for name in ("mla_kernels", "autotune", "reference", "bench"):
        shutil.copytree(op.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-C", folder, *IDENTITY, *arguments], check=True)
    return folder


@pytest.fixture
def repository(_repository, monkeypatch):
    """This tree as a repository of its own, whatever it is checked out from."""
    monkeypatch.setattr(op, "ROOT", _repository)


IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")


def trees():
    return op.git("worktree", "list").stdout


def test_every_public_op_has_cases():
    assert OPS.keys() == SIGNATURES.keys() - {"quantisation_error"}
    assert all(chosen.cases for chosen in OPS.values())


@pytest.mark.parametrize("name", OPS)
def test_a_case_is_the_same_from_the_same_seed(name):
    """So two processes compare the same problem; and a second call repeats the first."""
    chosen = OPS[name]
    results = []
    with launch.on_cpu("torch"), torch.no_grad():
        for _ in range(2):
            torch.manual_seed(0)
            run = chosen.build(Make("cpu"), **next(iter(chosen.cases.values())))
            run()
            results.append([tensor.clone() for tensor in run()])
    assert op.difference(*results) == "same results"


@pytest.mark.usefixtures("repository")
def test_beside_an_older_revision(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "times.json"
    assert op.main(["update_bias", "--base", "HEAD", "--rounds", "2", "--json", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path] and str(tmp_path) not in trees()
    head, machine, line = capfd.readouterr().out.splitlines()
    commit = op.commit("HEAD")
    assert head.startswith(f"update_bias: the working tree beside HEAD ({commit[:12]}); 2 rounds")
    assert f"torch {torch.__version__}" in machine and "triton " in machine
    assert line.startswith("experts=256  tree ") and "  base / tree " in line and line.endswith("same results")
    saved = json.loads(path.read_text())
    assert (saved["op"], saved["base"], saved["device"]) == ("update_bias", commit, "cpu")
    ((case,),) = (saved["cases"],)
    assert {label: len(times) for label, times in case["times"].items()} == {"tree": 2, "base": 2}


def test_an_error_on_one_side_ends_the_run(capfd, monkeypatch):
    """Such as an op that the older revision has not."""
    monkeypatch.setitem(OPS, "made_up", OPS["update_bias"])
    assert op.main(["made_up"]) == 2
    assert "error: tree: KeyError: 'made_up'" in capfd.readouterr().err


@pytest.mark.usefixtures("repository")
def test_the_worktree_goes_whatever_happens():
    with pytest.raises(ZeroDivisionError), op.worktree(op.commit("HEAD")) as tree:
        assert (tree / "mla_kernels" / "__init__.py").is_file() and str(tree) in trees()
        raise ZeroDivisionError
    assert not tree.exists() and str(tree) not in trees()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mla_decod"], "mla_decod: no such op; accepted: absorb_query, align_blocks, "),
        (["route", "--base", "no-such-thing"], "--base no-such-thing: git knows no such revision"),
        (["route", "--base=--help"], "--base --help: git knows no such revision"),
        (["route", "--device", "cuda"], "--device cuda: torch"),
        (["route", "--json", "/nowhere/times.json"], "--json /nowhere/times.json: there is no folder /nowhere"),
    ],
)
def test_refusals(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(op, "Side", None)
    assert op.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("rounds", ["0", "-1", "two"])
def test_rounds_are_counted_from_1(rounds, capsys):
    with pytest.raises(SystemExit) as stopped:
        op.main(["route", f"--rounds={rounds}"])
    assert stopped.value.code == 2 and "accepted is an integer from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ours, base, words",
    [
        ([1.0, NAN, float("inf")], [1.0, NAN, float("inf")], "same results"),
        ([1.0, 2.0], [1.5, -4.0], "largest difference 6, largest value 4"),
        ([1.0, NAN], [1.0, 2.0], "NaN in other places"),
        ([1.0], [1.0, 2.0], "results of other shapes: [1] torch.float32, base [2] torch.float32"),
        ([], [], "same results"),
    ],
)
def test_differences(ours, base, words):
    assert op.difference([torch.tensor(ours)], [torch.tensor(base)]) == words


def test_quartiles():
    assert op.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert op.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
