"""The tables: one JSON file a chip, read by :mod:`mla_kernels.launch`.

``{"format": 1, "chip": "sm_90", "entries": [{"kernel", "dtype", "case", "statics", "sizes", "tile", "provenance",
"seconds", "rule_seconds", "rank", "considered", "source", "versions", "memory"}, ...]}``. ``provenance`` is
``"modelled"`` (ranked by :mod:`mla_kernels.autotune.model`, compiled, never timed), ``"rule"`` (the kernel's own rule,
compiled, never timed) or ``"measured"``. ``source`` is the hash of the kernel's source that was compiled.
"""

import json
import os
import tempfile
from pathlib import Path

FORMAT = 1
TABLES = Path(__file__).parent / "tables"
FIELDS = {"kernel", "dtype", "case", "statics", "sizes", "tile", "provenance", "source", "versions"}


def load_table(path: Path, chip: str) -> list[dict]:
    """Entries of the table at ``path``. ValueError names the path and what is wrong with it."""
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON table ({error})") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"{path}: got a table of another format, accepted: format {FORMAT}")
    if table.get("chip") != chip:
        raise ValueError(f"{path}: a table for {table.get('chip')!r}, expected {chip!r}")
    for index, entry in enumerate(table["entries"]):
        if missing := FIELDS - set(entry):
            raise ValueError(f"{path}: entry {index} lacks {', '.join(sorted(missing))}")
    return table["entries"]


def write_table(path: Path, chip: str, entries: list[dict]) -> None:
    """Replace the table at ``path`` in one step, entries in a fixed order."""
    entries = sorted(entries, key=lambda e: (e["kernel"], e["case"], e["dtype"]))
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    text = f'{{"format": {FORMAT}, "chip": {json.dumps(chip)}, "entries": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
