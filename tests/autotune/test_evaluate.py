"""Scores of tile choices against measured winners, and the fit, on files made here."""

import csv
import itertools
import json

import numpy as np
import pytest

from mla_kernels.autotune import __main__ as cli
from mla_kernels.autotune import evaluate, fit, measured, moe_model
from mla_kernels.autotune.measured import COLUMNS, Candidates, Point, geometry, halves, read_points
from mla_kernels.targets.devices import device

A100 = "NVIDIA_A100-SXM4-80GB"
H100 = "NVIDIA_H100_80GB_HBM3"
SHAPES = [(8, 2048), (8, 3584), (16, 1344), (64, 704), (64, 1408), (128, 192), (128, 384), (256, 256)]
TOKENS = (1, 16, 128, 1024, 4096)


def row(name=A100, shape=(8, 2048), tokens=16, tile=(16, 64, 128, 4), **changes):
    values = dict.fromkeys(COLUMNS, "") | {"device": name, "experts": shape[0], "intermediate": shape[1]}
    values |= dict(zip(("block_m", "block_n", "block_k", "num_warps"), tile))
    return values | {"tokens": tokens, "group_m": 1, "num_stages": 3} | changes


def write(path, rows, columns=COLUMNS):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(choose, name=A100, shapes=SHAPES, **changes):
    """A row for every shape and token count with the tile of ``choose`` (point)."""
    return [
        row(name, shape, tokens, choose(Point(name, *shape, "", "", tokens, (0, 0, 0, 0), 0, 0)), **changes)
        for shape, tokens in itertools.product(shapes, TOKENS)
    ]


def first_by_model(name):
    scorer = evaluate.Scorer(device(name))
    return lambda point: scorer.space.named[int(np.argmax(scorer.model(point)))]


def test_what_the_model_calls_best_is_first(tmp_path):
    path = write(tmp_path / "a.csv", rows_of(first_by_model(A100)))
    scores = evaluate.evaluate(path)["devices"][A100]
    assert scores["scored"] == scores["points"] == len(SHAPES) * len(TOKENS)
    assert (scores["device"], scores["target"], scores["outside_space"]) == ("a100", "sm_80", 0)
    assert scores["methods"]["model"] == {
        "rank_percentile": 0.0,
        "recall": dict.fromkeys(map(str, evaluate.RECALLS), 1.0),
    }
    assert scores["methods"]["default"]["recall"]["1"] < 1
    assert scores["label_noise"] is None


def test_random_is_random_and_popularity_counts_the_other_half(tmp_path):
    path = write(tmp_path / "a.csv", rows_of(lambda point: (64, 64, 64, 8)))
    scores = evaluate.evaluate(path)["devices"][A100]
    assert scores["methods"]["random"]["rank_percentile"] == pytest.approx(50)
    assert scores["methods"]["random"]["recall"]["16"] == pytest.approx(16 / scores["tiles"], rel=0.01)
    assert scores["methods"]["popularity"]["recall"]["1"] == 1
    assert scores["methods"]["model + same chip"]["rank_percentile"] < scores["methods"]["model"]["rank_percentile"]


def test_the_rule_and_the_default(tmp_path):
    default = lambda point: evaluate.default_tile(point.tokens, point.experts)  # noqa: E731
    for method, choose in (("rule", evaluate.rule_tile), ("default", default)):
        path = write(tmp_path / "a.csv", rows_of(lambda p, of=choose: (*of(p)[:2], 64, 4)))
        found = evaluate.evaluate(path)["devices"][A100]["methods"]
        assert found[method]["rank_percentile"] < 5 < found["random"]["rank_percentile"]
    assert evaluate.default_tile(8, 8) == (16, 32, 64, 4) and evaluate.default_tile(9, 8) == (64, 64, 32, 4)
    assert evaluate.rule_tile(Point(A100, 8, 14336, "", "", 200, (), 3, 1))[0] == 64  # 50 rows an expert


def test_places_of_equals_are_their_middle():
    scores = np.array([3.0, 1.0, 1.0, 1.0, -np.inf])
    assert evaluate.place(scores, 0) == (0, 1, 4)
    assert evaluate.place(scores, 2) == (1, 3, 4)
    assert evaluate.place(scores, 4) == evaluate.place(scores, None) == (4, 1, 4)
    found = evaluate.metrics([(1, 3, 4)])
    assert found["rank_percentile"] == pytest.approx(100 * 2 / 3)
    assert found["recall"] == {"1": 0, "4": 1, "8": 1, "16": 1, "32": 1}
    last = evaluate.metrics([(4, 1, 4)])
    assert last["rank_percentile"] == 100 and last["recall"]["4"] == 0


def test_shapes_of_the_fit_are_not_scored(tmp_path):
    fitted = [tuple(shape) for shape in moe_model.constants()["fitted_on"]["shapes"]]
    path = write(tmp_path / "a.csv", rows_of(evaluate.rule_tile, H100, [*fitted, (9, 999), (40, 1536)]))
    scores = evaluate.evaluate(path)["devices"][H100]
    assert scores["shapes_scored"] == [(9, 999), (40, 1536)] and scores["shapes"] == len(fitted) + 2
    only = write(tmp_path / "b.csv", rows_of(evaluate.rule_tile, H100, fitted[:2]))
    scores = evaluate.evaluate(only)["devices"][H100]
    assert scores["scored"] == 0 and scores["methods"] == {}
    other = write(tmp_path / "c.csv", rows_of(evaluate.rule_tile, "NVIDIA_H200", fitted[:4]))
    assert evaluate.evaluate(other)["devices"]["NVIDIA_H200"]["scored"] == 4 * len(TOKENS)


def test_label_noise_counts_agreement_of_versions(tmp_path):
    one = rows_of(lambda p: (16, 64, 64, 4), shapes=SHAPES[:2], triton="3_1_0")
    copied = [dict(values, triton="3_2_0") for values in one[: len(TOKENS)]]
    differs = [dict(values, triton="3_2_0", group_m=16) for values in one[len(TOKENS) :]]
    differs[0]["block_n"] = 128
    noise = evaluate.evaluate(write(tmp_path / "a.csv", one + copied + differs))["devices"][A100]["label_noise"]
    assert noise["problems"] == 10 and noise["tile"] == 0.9 and noise["whole"] == 0.5
    assert noise["without_copies"] == {"problems": 5, "tile": 0.8, "whole": 0.0}


def test_winners_outside_the_space_are_last(tmp_path):
    rows = [row(tile=(16, 64, 32, 4)), row(tokens=4096, tile=(256, 256, 256, 4))]
    scores = evaluate.evaluate(write(tmp_path / "a.csv", rows))["devices"][A100]
    assert scores["outside_space"] == 2 and scores["methods"]["model"]["rank_percentile"] == 100


def test_one_product_and_other_dtypes(tmp_path):
    rows = [row(dtype="fp8_w8a8_down", name=H100, shape=(9, 64)), row(dtype="int8_w8a16"), row(gemm="down")]
    path = write(tmp_path / "a.csv", rows)
    assert [point.gemm for point in read_points(path)] == ["down"]
    assert [point.gemm for point in read_points(path, "fp8_w8a8")] == ["down"]
    for dtype in ("fp8_w8a8", "int8_w8a16"):
        (scores,) = evaluate.evaluate(path, dtype)["devices"].values()
        assert scores["scored"] == 1 and scores["dtype"] == dtype


def test_amd_has_a_space_of_its_own(tmp_path):
    rows = [row("AMD_Instinct_MI300X", tile=(16, 16, 256, 1), num_stages=2)]
    scores = evaluate.evaluate(write(tmp_path / "a.csv", rows))["devices"]["AMD_Instinct_MI300X"]
    assert scores["outside_space"] == 0 and scores["tiles"] > 200 and scores["target"] == "gfx942"


def test_halves_are_fixed_and_the_first_is_never_larger():
    first, second = halves(SHAPES[:7])
    assert len(first) == 3 and first | second == set(SHAPES[:7]) and not first & second
    assert halves(reversed(SHAPES[:7] * 2)) == (first, second)


def test_geometry_of_known_and_unknown_shapes():
    assert geometry(256, 2048) == (7168, 8)  # DeepSeek-V3
    assert geometry(256, 256) == (7168, 8)  # on 8 devices
    assert geometry(257, 256) == (7168, 9)  # with its shared expert
    assert geometry(48, 2048) == (7168, 8)  # an eighth of Kimi-K2's experts
    assert geometry(8, 1792) == (4096, 2)  # Mixtral-8x7B on 8 devices
    assert [geometry(e, 999) for e in (1, 5, 20, 200)] == [(4096, 1), (6144, 2), (4096, 4), (4096, 8)]


def test_files_that_are_none(tmp_path):
    def refused(match, rows=(), columns=COLUMNS, dtype="bf16"):
        with pytest.raises(ValueError, match=match):
            evaluate.evaluate(write(tmp_path / "a.csv", rows, columns), dtype)

    with pytest.raises(ValueError, match=r"missing.csv: cannot be read"):
        evaluate.evaluate(tmp_path / "missing.csv")
    refused("lacks the columns num_stages; accepted: device, ", [row()], COLUMNS[:-1])
    refused("no row of dtype bf16; it holds no row at all")
    refused("no row of dtype bf16; it holds int4_w4a16", [row(dtype="int4_w4a16")])
    refused("a.csv: line 3: block_n: got 0, accepted: positive", [row(), row(tile=(16, 0, 64, 4))])
    refused("line 2: invalid literal", [row(tokens="many")])
    refused("line 2: gemm: got 'middle', accepted: up, down or nothing", [row(gemm="middle")])
    refused("dtype: got 'fp7', accepted: bf16, ", [row()], dtype="fp7")
    refused("NVIDIA_H1: device 'NVIDIA_H1' is unknown; known are a100", [row("NVIDIA_H1")])
    refused("Ascend910B3: the model is one of GPUs", [row("Ascend910B3")])


def test_command_line(tmp_path, capsys):
    path = write(tmp_path / "a.csv", [*rows_of(evaluate.rule_tile, shapes=SHAPES[:2]), row("NVIDIA_H1")])
    assert cli.main(["evaluate", "--measured", str(path)]) == 0
    printed = capsys.readouterr()
    assert A100 in printed.out and "recall@16" in printed.out and "NVIDIA_H1: no figures" in printed.err
    for method in evaluate.METHODS:
        assert f"\n{method} " in printed.out
    assert cli.main(["evaluate", "--measured", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["devices"][A100]["methods"]) == set(evaluate.METHODS) and found["unknown"] == ["NVIDIA_H1"]
    assert cli.main(["evaluate", "--measured", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: cannot be read" in capsys.readouterr().err


def test_a_fit_finds_the_preference_behind_the_winners(tmp_path, capsys):
    """Winners drawn with the shipped weights on an A100: the new weights rank them well on shapes not seen."""
    random = np.random.default_rng(0)
    scorer = evaluate.Scorer(device(A100))

    def draw(point):
        scores = scorer.model(point)
        return scorer.space.named[int(np.argmax(scores + random.gumbel(size=len(scores))))]

    path = write(tmp_path / "a.csv", rows_of(draw))
    output = tmp_path / "constants.json"
    assert cli.main(["fit", "--measured", str(path), "--output", str(output)]) == 0
    assert "4 shapes; 4 shapes are left" in capsys.readouterr().out
    constants = json.loads(output.read_text())
    assert set(constants) == set(moe_model.constants()) and set(constants["weights"]) == set(moe_model.FEATURES)
    assert all(constants["weights"][name] <= 0 for name in moe_model.COSTS)
    assert constants["fitted_on"]["device"] == A100 and constants["fitted_on"]["points"] == 20

    fitted = {tuple(shape) for shape in constants["fitted_on"]["shapes"]}
    weights = np.array([constants["weights"][name] for name in moe_model.FEATURES])
    space, ranks = Candidates.of(device(A100)), []
    for point in read_points(path):
        if point.shape not in fitted:
            parts = measured.problem_terms(device(A100), point, space.tiles)
            scores = moe_model.features(space.tiles, parts) @ weights
            scores = measured.best_stages(scores, moe_model.valid(parts), len(space.stages))
            ranks.append((scores > scores[space.named.index(point.tile)]).sum())
    assert len(ranks) == 20 and np.mean(np.array(ranks) < 32) > 0.7
    first = output.read_text()
    assert cli.main(["fit", "--measured", str(path), "--output", str(output)]) == 0
    assert output.read_text() == first
    assert cli.main(["fit", "--measured", str(path), "--device", "x", "--output", str(output)]) == 2
    assert "--device: got 'x', the file holds NVIDIA_A100" in capsys.readouterr().err


def test_stages_of_a_winner_are_optional_to_the_fit():
    point = Point(A100, 8, 2048, "", "", 64, (16, 128, 128, 4), 7, 1)
    outside = Point(A100, 8, 2048, "", "", 64, (16, 128, 32, 4), 3, 1)
    found = fit.samples(device(A100), [point, outside])
    assert found.stages.tolist() == [-1] and found.features.shape == (1, 480, len(moe_model.FEATURES))
