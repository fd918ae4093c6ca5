"""report and diff: the pages hold what was looked up and compiled; differences between stores and tables."""

import base64
import json
import re

import pytest

from mla_kernels import tile_files
from mla_kernels.autotune.__main__ import main
from mla_kernels.autotune.store import append, write_table
from mla_kernels.launch import KERNELS
from mla_kernels.tile_files import BadFile, Entry

KERNEL = KERNELS["moe_combine_kernel"]
CASE = KERNEL.cases[0]


def entry(tokens=1, provenance="modelled", block=512, warps=4, **detail):
    tile = {"BLOCK_H": block, "num_warps": warps}
    sizes = dict(CASE.sizes) | {"tokens": tokens}
    return Entry(KERNEL.name, "bf16", KERNEL.source_hash, dict(CASE.statics), sizes, (tile,), provenance, detail)


@pytest.mark.parametrize("target", ["h200", "910b"])
def test_the_pages_hold_every_problem_with_its_compiled_tile(tmp_path, capsys, target):
    assert main(["report", "--target", target, "--kernel", KERNEL.name, "--output", str(tmp_path)]) == 0
    paths = [tmp_path / f"report-{target}.md", tmp_path / f"report-{target}.html"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    text, page = (path.read_text() for path in paths)
    rows = [line for line in text.splitlines() if line.startswith(f"| {KERNEL.name} ")]
    assert len(rows) == len(KERNEL.cases)
    assert f"{len(KERNEL.cases)} problems" in text and "modelled" in text
    assert page.count(f"<td>{KERNEL.name}</td>") == len(KERNEL.cases)
    images = re.findall(r'base64,([^"]+)"', page)
    assert len(images) == 2 and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    memory = "shared" if target == "h200" else "UB"
    assert all(f"{memory} " in row and "KiB" in row for row in rows)


def test_a_page_without_problems_is_written_too(tmp_path, monkeypatch):
    monkeypatch.setitem(KERNEL.unsupported, "sm_90", "no reason but this test")
    assert main(["report", "--target", "h200", "--kernel", KERNEL.name, "--output", str(tmp_path)]) == 0
    assert (
        "no reason but this test" in (tmp_path / "report-h200.md").read_text()
        or "0 problems" in (tmp_path / "report-h200.md").read_text()
    )


def test_diff_of_two_stores(tmp_path, capsys):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    append(before, "h200", [entry(1), entry(16), entry(64), entry(128)])
    times = [{"tile": {"BLOCK_H": 1024, "num_warps": 4}, "median": 2e-6, "p20": 1e-6, "p80": 3e-6, "n": 9}]
    append(after, "h200", [entry(1), entry(16, block=1024, times=times), entry(64, "measured"), entry(256)])
    assert main(["diff", str(before), str(after), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(r["change"], r["sizes"]["tokens"]) for r in records} == {
        ("tile", 16), ("provenance", 64), ("removed", 128), ("added", 256),
    }  # fmt: skip
    assert main(["diff", str(before), str(after)]) == 0
    printed = capsys.readouterr().out
    assert "4 of 5 problems differ" in printed and "2.0 us" in printed


def test_diff_of_a_table_and_a_store(tmp_path, capsys):
    table, store = tmp_path / "h200.json", tmp_path / "h200.jsonl"
    write_table(table, "h200", [entry(1), entry(16)], {"triton": "3.7.1"})
    append(store, "h200", [entry(1), entry(16, warps=8)])
    assert main(["diff", str(table), str(store), "--json"]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["before"]["tile"]["num_warps"] == 4 and record["after"]["tile"]["num_warps"] == 8


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 2}', "tiles"])
def test_diff_refuses_what_is_neither(tmp_path, text, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    assert main(["diff", str(bad), str(bad)]) == 2
    assert str(bad) in capsys.readouterr().err
    with pytest.raises(BadFile, match="there is no such file"):
        from mla_kernels.autotune.diff import read

        read(tmp_path / "none.json")


def test_formats_are_told_apart_by_their_content_not_their_name(tmp_path):
    store = tmp_path / "tiles.json"
    append(store, "h200", [entry(1)])
    assert tile_files.read_store(store, "h200")
    assert main(["diff", str(store), str(store)]) == 0
