"""Tables and stores as files: round trips, refusals, two writers, a full disk."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from mla_kernels.autotune import store
from mla_kernels.tile_files import BadFile, Entry, read_store, read_table, store_header

TILE, OTHER = {"BLOCK": 64, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 8}


def entry(rows=1, **changes):
    fields = dict(
        kernel="k", dtype="bf16", source="abc", statics={"EVEN": True, "LAYOUT": "plain"}, sizes={"rows": rows},
        shortlist=(TILE, OTHER), provenance="modelled", detail={},
    )  # fmt: skip
    return Entry(**(fields | changes))


def test_a_table_comes_back_as_it_was(tmp_path):
    path = tmp_path / "h200.json"
    entries = [entry(1), entry(8, shortlist=(OTHER,), provenance="rule"), entry(8, dtype="fp32"), entry(2, kernel="j")]
    store.write_table(path, "h200", entries, {"triton": "3.7.1"})
    found = read_table(path, "h200")
    assert sorted(found, key=str) == sorted(entries, key=str)
    assert type(found[0].statics["EVEN"]) is bool and found[0].tile == found[0].shortlist[0]
    assert [p.name for p in tmp_path.iterdir()] == ["h200.json"]  # no temporary file is left
    before = path.read_bytes()
    store.write_table(path, "h200", reversed(entries), {"triton": "3.7.1"})
    assert path.read_bytes() == before


def test_a_table_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "h200.json"
    store.write_table(path, "h200", [entry()], {})
    with pytest.raises(BadFile, match="a table for 'h200', expected 'h100'"):
        read_table(path, "h100")
    text = path.read_text()
    for wrong, message in (
        ("nonsense", "not a JSON table"),
        (json.dumps({"format": 1}), "another format"),
        (text.replace('"tiles":[{', '"tile":[{'), "group 0 is damaged"),
        (text.replace("[0,1]", "[0,7]"), "group 0 is damaged"),
    ):
        path.write_text(wrong)
        with pytest.raises(BadFile, match=message) as error:
            read_table(path, "h200")
        assert str(path) in str(error.value)


def test_a_store_grows_line_by_line(tmp_path):
    path = tmp_path / "new" / "h200.jsonl"
    assert read_store(path, "h200") == []
    first, second = entry(1), entry(8, provenance="measured", detail={"times": [{"median": 1e-5, "n": 7}]})
    store.append(path, "h200", [first])
    store.append(path, "h200", [second])
    assert read_store(path, "h200") == [first, second]
    assert json.loads(path.read_text().splitlines()[0]) == store_header("h200")


def test_an_unfinished_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path):
    path = tmp_path / "h200.jsonl"
    store.append(path, "h200", [entry(1)])
    with path.open("a") as file:
        file.write('{"kernel": "k", "dty')
    assert read_store(path, "h200") == [entry(1)]
    store.append(path, "h200", [entry(2)])
    assert read_store(path, "h200") == [entry(1), entry(2)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("hello\n", "its first line is 'hello'"),
        ("no end", "its first line is 'no end'"),
        ("\x00\x01\n", "its first line is"),
        (json.dumps(store_header("h100")) + "\n", "expected"),
        (json.dumps(store_header("h200") | {"version": 9}) + "\n", "expected"),
        (json.dumps(store_header("h200")) + "\nhello\n", "line 2 is damaged"),
        (json.dumps(store_header("h200")) + '\n{"kernel": "k"}\n', "line 2 is damaged"),
        (json.dumps(store_header("h200")) + "\n[]\n", "line 2 is damaged"),
    ],
)
def test_a_foreign_or_damaged_store_is_refused_and_left_as_it_is(tmp_path, text, message):
    path = tmp_path / "h200.jsonl"
    path.write_text(text)
    for attempt in (lambda: read_store(path, "h200"), lambda: store.append(path, "h200", [entry()])):
        with pytest.raises(BadFile, match=message) as error:
            attempt()
        assert str(path) in str(error.value)
    assert path.read_text() == text


def _write(path, process, count):
    for index in range(count):
        store.append(Path(path), "h200", [entry(process * count + index)])


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path, count = tmp_path / "h200.jsonl", 25
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, process, count)) for process in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(e.sizes["rows"] for e in read_store(path, "h200")) == list(range(4 * count))


FULL = """
import resource, signal, sys
from pathlib import Path
from mla_kernels.autotune import store
from tests.autotune.test_store import entry
path, size = Path(sys.argv[1]), Path(sys.argv[1]).stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for room in 100, 1, 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, size + 100))
    try:
        store.append(path, "h200", [entry(99)] * 3)
    except OSError as error:
        print("refused:", error, path.stat().st_size == size)
"""


@pytest.mark.leave_out("file size limits are POSIX", when=lambda: sys.platform == "win32")
def test_a_full_disk_leaves_what_was_stored(tmp_path):
    path = tmp_path / "h200.jsonl"
    store.append(path, "h200", [entry(1), entry(2)])
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["True"] * 3, done.stdout + done.stderr
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    path = tmp_path / "home" / "tiles" / "h200.jsonl"
    assert_refused = pytest.raises(OSError)
    with assert_refused:
        store.check_writable(path, "h200")
    with pytest.raises(BadFile, match="cannot be read"):
        read_store(path, "h200")


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "h200.json"
    store.replace_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.replace_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
