"""From a store to the tables that ship, and to the cost model's score; times are made for the test, in its folder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import __main__ as cli
from mla_kernels.autotune import evaluate, model, moe_model, problems, search, timed
from mla_kernels.autotune.models import MODELS
from mla_kernels.autotune.session import current
from mla_kernels.autotune.store import append, write_table
from mla_kernels.launch import KERNELS
from mla_kernels.targets.devices import DEVICES
from mla_kernels.tile_files import Entry

H200 = DEVICES["h200"]
ABOUT = {"date": "2026-01-02T03:04:05+00:00", "versions": {"triton": "3.6.0"}, "part": H200.part}


@pytest.fixture(scope="module")
def found():
    """Grouped products of two models, for which there are several shapes."""
    listed = []
    for name in ("deepseek-v2-lite", "glm-5"):
        listed += problems.of_model(MODELS[name].on(2), H200, torch.bfloat16, ("fused_moe",))[0]
    return [one.problem for one in listed if one.problem.kernel.name in model.GROUPED]


@pytest.fixture(autouse=True)
def _own_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tile_files, "store_path", lambda device: tmp_path / f"none-{device}.jsonl")
    tiles.reload()
    yield
    monkeypatch.undo()
    tiles.reload()


def measured(problem, seconds, count=12, **changes):
    """An entry whose times ``seconds(tiles)`` gives; the tile in use is the rule's."""
    fitting = list(search.candidates(problem.kernel, H200, problem.dtype, problem.statics))
    rule = dict(problem.kernel.rule(H200, problem.dtype, problem.statics, problem.sizes))
    some = [rule, *(tile for tile in fitting[:: max(1, len(fitting) // count)] if tile != rule)][:count]
    times = sorted(zip(seconds(some), map(json.dumps, some)))
    times = [{"tile": json.loads(tile), "median": float(s), "p20": s, "p80": s, "n": 7} for s, tile in times]
    fields = {"source": problem.kernel.source_hash} | changes
    shortlist = tuple(one["tile"] for one in times)
    detail = ABOUT | {"times": times, "control": rule, "noise": 0.0, "error": 0.0}
    return Entry(
        problem.kernel.name, problem.dtype, fields["source"], problem.statics, problem.sizes, shortlist, "measured",
        detail,
    )  # fmt: skip


def as_modelled(problem):
    return lambda some: model.all_seconds(problem.kernel, H200, problem.dtype, problem.statics, problem.sizes, some)


def backwards(problem):
    return lambda some: 1e-9 / np.array(as_modelled(problem)(some))


def store(path: Path, entries) -> Path:
    append(path, "h200", entries)
    return path


def test_what_was_measured_ships_and_stays(found, tmp_path, capsys, monkeypatch):
    problem, other = found[0], found[1]
    path = store(tmp_path / "s.jsonl", [measured(problem, backwards(problem)), measured(other, backwards(other))])
    chosen = current(tile_files.read_store(path, "h200"))
    table = tmp_path / "h200.json"
    rule = dict(problem.kernel.rule(H200, problem.dtype, problem.statics, problem.sizes))
    before = Entry(
        problem.kernel.name, problem.dtype, problem.kernel.source_hash, problem.statics, problem.sizes, (rule,), "rule"
    )
    write_table(table, "h200", [before], {"triton": "0.0.1"})
    assert cli.main(["ship", str(path), "--also", "h100", "--output", str(tmp_path)]) == 0
    assert json.loads(table.read_text())["versions"] == {"triton": "0.0.1"}
    text = capsys.readouterr().out
    assert f"{table}: 2 measured problems, 1 of them in place of others (1 with another tile); 0 are as before" in text
    for device in ("h200", "h100"):
        monkeypatch.setattr(tile_files, "table_path", lambda name: tmp_path / f"{name}.json")
        tiles.reload()
        found = tiles.look_up(problem.kernel, DEVICES[device], problem.dtype, problem.statics, problem.sizes)
        assert (found.origin, found.device, found.entry.provenance) == ("table", device, "measured")
        (wanted,) = [e for e in chosen.values() if e.kernel == problem.kernel.name and e.sizes == problem.sizes]
        assert found.tile == wanted.tile != rule and dict(found.entry.detail) == ABOUT
        assert cli.main(["show", "--target", device, "--model", "deepseek-v2-lite", "--tp", "2"]) == 0
        assert f"table of {device}, measured on {H200.part}" in capsys.readouterr().out
    monkeypatch.setattr(search, "compile_many", lambda *_: [])
    monkeypatch.setattr("mla_kernels.autotune.tables.model_problems", lambda chip, models: [])
    assert cli.main(["tables", "--target", "h200", "--output", str(tmp_path)]) == 0
    kept = tile_files.read_table(table, "h200")
    assert [entry.provenance for entry in kept] == ["measured", "measured"]
    assert cli.main(["tables", "--target", "h200", "--output", str(tmp_path), "--model", "glm-5"]) == 0
    assert tile_files.read_table(table, "h200") == kept
    assert cli.main(["diff", str(path), str(table)]) == 0


def test_refusals(found, tmp_path, capsys):
    problem = found[0]
    old = store(tmp_path / "old.jsonl", [measured(problem, as_modelled(problem), source="0" * 16)])
    good = store(tmp_path / "good.jsonl", [measured(problem, as_modelled(problem))])
    for arguments, words in (
        ([str(tmp_path / "none.jsonl")], "there is no such file"),
        ([__file__], "no store of tiles"),
        ([written(tmp_path, "other", {"device": "nvidia-x"})], "other.jsonl: device 'nvidia-x' is unknown; known are"),
        (
            [written(tmp_path, "list", {"device": ["h200"]})],
            "{'format': 'mla_kernels tiles', 'version': 1, 'device': [",
        ),
        ([written(tmp_path, "next", {"version": 9, "device": "h200"})], "its first line is {'format': 'mla_kernels ti"),
        ([str(old)], "nothing in it was measured with the kernels' present sources"),
        ([str(good), "--also", "a100"], "--also: got a100 (sm_80), devices of sm_90 are accepted"),
    ):
        assert cli.main(["ship", *arguments, "--output", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "h200.json").exists()
    assert cli.main(["evaluate", "--measured", str(old)]) == 2
    assert "no timed problem of moe_gate_up_kernel" in capsys.readouterr().err
    for command, words in (
        (["evaluate", "--dtype", "fp16"], "--dtype: got fp16, it chooses rows of a CSV"),
        (["fit", "--device", "a100", "--output", str(tmp_path / "fit.json")], "--device: got 'a100', the store is of"),
    ):
        assert cli.main([*command, "--measured", str(good)]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["evaluate", "--measured", str(tmp_path / "next.jsonl")]) == 2
    assert "its first line is {'format': 'mla_kernels tiles', 'version': 9" in capsys.readouterr().err


def written(folder: Path, name: str, head: dict) -> str:
    """A file with the first line of a store that is of another kind."""
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(tile_files.STORE_FORMAT | head) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: {"detail": {}}, "without part, date, versions, times, control, error"),
        (lambda e: {"detail": e.detail | {"part": "A100"}}, "on 'A100', and the store is of"),
        (lambda e: {"detail": e.detail | {"times": [{}]}}, "its times are damaged"),
        (lambda e: {"detail": e.detail | {"error": 0.5}}, "its result was 0.5 off, accepted 0.03"),
        (lambda e: {"detail": e.detail | {"error": math.nan}}, "its result was nan off"),
        (lambda e: {"detail": timed_at(e, 0.0)}, "its times are [0.0, "),
        (lambda e: {"detail": timed_at(e, math.nan)}, "its times are [nan, "),
        (lambda e: {"shortlist": e.shortlist[:1] + e.shortlist[2:]}, "its tiles are not those that were timed"),
        (lambda e: {"shortlist": e.shortlist[::-1]}, "its tiles are not those that were timed"),
        (lambda e: {"dtype": "fp4"}, "in fp4 with"),
        (lambda e: {"statics": {"BLOCK_E": 1}}, "in bf16 with {'BLOCK_E': 1}; the kernel takes"),
        (lambda e: {"sizes": {**e.sizes, "hats": 3}}, "the kernel has no hats; it has"),
    ],
)
def test_what_no_tuner_has_written_does_not_ship(found, tmp_path, capsys, change, words):
    """Such an entry beside a good one: no table is written, and nothing is scored or fitted."""
    entry = measured(found[0], as_modelled(found[0]))
    bad = store(tmp_path / "s.jsonl", [measured(found[1], as_modelled(found[1])), replace(entry, **change(entry))])
    for command in (
        ["ship", str(bad), "--output", str(tmp_path)],
        ["evaluate", "--measured", str(bad)],
        ["fit", "--measured", str(bad), "--output", str(tmp_path / "fit.json")],
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert f"s.jsonl: {entry.kernel} {{" in error and f"says that it was measured, but {words}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


def timed_at(entry, seconds):
    first, *others = entry.detail["times"]
    return entry.detail | {"times": [first | {"median": seconds}, *others]}


def test_all_tables_are_written_or_none(found, tmp_path, capsys):
    """A damaged table of another device is found before the first is written."""
    good = store(tmp_path / "good.jsonl", [measured(found[0], as_modelled(found[0]))])
    (tmp_path / "h100.json").write_text("{}")
    assert cli.main(["ship", str(good), "--also", "h100", "--output", str(tmp_path)]) == 2
    assert "h100.json: got a file of another format" in capsys.readouterr().err
    assert not (tmp_path / "h200.json").exists()


def test_the_model_is_scored_against_times(found, tmp_path, capsys):
    right = store(tmp_path / "right.jsonl", [measured(p, as_modelled(p)) for p in found])
    scores = evaluate.evaluate_store(right)
    assert scores["problems"] == scores["scored"] == len(found) and scores["tiles"] == 12
    assert scores["methods"]["model"]["rank_percentile"] == 0.0 and scores["methods"]["model"]["lost"] == 0.0
    assert scores["methods"]["model"]["recall"]["1"] == 1.0
    assert scores["methods"]["random"]["rank_percentile"] == pytest.approx(50)
    wrong = evaluate.evaluate_store(store(tmp_path / "wrong.jsonl", [measured(p, backwards(p)) for p in found]))
    assert wrong["methods"]["model"]["rank_percentile"] > 90 and wrong["methods"]["model"]["lost"] > 1
    assert cli.main(["evaluate", "--measured", str(right)]) == 0
    text = capsys.readouterr().out
    assert f"(h200, sm_90): {len(found)} of {len(found)} timed problems of moe_down_kernel, moe_gate_up_kernel" in text
    assert cli.main(["evaluate", "--measured", str(right), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"].keys() == {"model", "in use", "random"}


def test_a_store_can_be_fitted(found, tmp_path, monkeypatch, capsys):
    """To times that the model has the wrong way round: the fitted one is better on the shapes that it has not seen."""
    path = store(tmp_path / "s.jsonl", [measured(p, backwards(p), 20) for p in found])
    before = evaluate.evaluate_store(path)["methods"]["model"]
    constants = tmp_path / "constants.json"
    few = store(tmp_path / "few.jsonl", [measured(p, backwards(p)) for p in (found[0], found[-1])])
    assert cli.main(["fit", "--measured", str(few), "--output", str(constants)]) == 2 and not constants.exists()
    assert "few.jsonl: 1 timed problems in half of its shapes, 12 are needed" in capsys.readouterr().err
    assert cli.main(["fit", "--measured", str(path), "--output", str(constants)]) == 0
    made = json.loads(constants.read_text())
    assert made["fitted_on"]["device"] == "h200" and made["fitted_on"]["shapes_left"] == 1
    monkeypatch.setattr(moe_model, "constants", lambda: made)
    monkeypatch.setattr(moe_model, "weights", lambda: np.array([made["weights"][name] for name in moe_model.FEATURES]))
    after = evaluate.evaluate_store(path)
    assert 0 < after["scored"] < after["problems"]
    assert after["methods"]["model"]["rank_percentile"] < before["rank_percentile"]
    assert math.isfinite(made["seconds"]["slope"])


def test_features_are_those_of_the_model(found, tmp_path):
    """The score of the features orders tiles as the modelled seconds do."""
    path = store(tmp_path / "s.jsonl", [measured(found[0], as_modelled(found[0]))])
    _, (one,) = timed.read(path)
    features, log_seconds = one.features(H200)
    assert np.argsort(-(features @ moe_model.weights())).tolist() == np.argsort(one.modelled(H200)).tolist()
    assert np.isfinite(log_seconds).all() and KERNELS[one.kernel] is found[0].kernel
