"""Writing tables and stores; :mod:`mla_kernels.tile_files` has the formats and reads them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mla_kernels.tile_files import TABLE_FORMAT, Entry, line_of, read_store, store_header

RUN = {"part", "date", "versions"}
"""What a table keeps of a measurement."""


def write_table(path: Path, device: str, entries: Iterable[Entry], versions: dict[str, str]) -> None:
    """Replace the table at ``path`` in one step, entries in a fixed order; of what is said beside a measured one, the
    part, the date and the versions are kept."""
    groups: dict[tuple, dict] = {}
    runs: list[dict] = []
    ordered = sorted(entries, key=lambda e: (e.kernel, e.dtype, json.dumps(dict(e.statics)), *e.sizes.values()))
    for entry in ordered:
        key = (entry.kernel, entry.dtype, entry.source, json.dumps(dict(entry.statics)), tuple(entry.sizes))
        group = groups.setdefault(key, {"tiles": [], "problems": []})
        chosen = []
        for tile in entry.shortlist:
            if dict(tile) not in group["tiles"]:
                group["tiles"].append(dict(tile))
            chosen.append(group["tiles"].index(dict(tile)))
        problem = [list(entry.sizes.values()), chosen, entry.provenance]
        if entry.provenance == "measured" and entry.detail.keys() >= RUN:
            run = {name: entry.detail[name] for name in sorted(RUN)}
            if run not in runs:
                runs.append(run)
            problem.append(runs.index(run))
        group["problems"].append(problem)
    lines = [
        json.dumps(
            {"kernel": kernel, "dtype": dtype, "source": source, "statics": json.loads(statics), "sizes": list(sizes)}
            | group,
            separators=(",", ":"),
        )
        for (kernel, dtype, source, statics, sizes), group in groups.items()
    ]
    about = {"format": TABLE_FORMAT, "device": device, "versions": versions} | ({"runs": runs} if runs else {})
    head = json.dumps(about)[:-1]
    replace_text(path, f'{head}, "groups": [\n' + ",\n".join(lines) + "\n]}\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old text or the new, and an error leaves the old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def append(path: Path, device: str, entries: Iterable[Entry]) -> None:
    """Add entries to the store at ``path``, made if there is none. Several processes may do so at once.

    The file is locked, read whole, and only then written at its end. A write that fails, of a full disk for one, leaves
    the file as it was. A last line that an interrupted process left without its end is cut off.

    Raises:
        mla_kernels.tile_files.BadFile: the file is no store for this device, or is damaged; nothing is written.
        OSError: it cannot be written.
    """
    text = "".join(line_of(entry) + "\n" for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file, _locked(file):
        read_store(path, device)
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        head = "" if end else json.dumps(store_header(device)) + "\n"
        left = (head + text).encode()
        try:
            file.truncate(end)
            while left:  # a write may take less than it is given
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def check_writable(path: Path, device: str) -> None:
    """What :func:`append` would refuse or fail at, found before any work is done."""
    append(path, device, ())


@contextlib.contextmanager
def _locked(file) -> Iterator[None]:
    """Hold the file for this process alone; the others wait. Without a system lock (neither POSIX nor Windows) it does
    nothing."""
    try:
        import fcntl
    except ImportError:
        pass
    else:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
        return
    try:
        import msvcrt
    except ImportError:
        yield
        return
    beyond = 1 << 30  # Windows locks bytes against reading, too: one that no file reaches
    file.seek(beyond)
    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    try:
        yield
    finally:
        file.seek(beyond)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
