"""python run.py [--tune SECONDS] [arguments of python -m mla_kernels device]: what mla_kernels.device.prepare made.

First ``python -m mla_kernels device``; with --tune then ``python -m mla_kernels.autotune tune`` for as many seconds,
whose store is that of --output. Archives are unpacked into a temporary folder; nothing is written here.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

PEERS, CACHE, TILES = "peers.tar.xz", "triton_cache.tar.xz", "tiles.tar.xz"
KEY, PACKAGES = "triton_key", "packages"


def unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def move_cache(folder: Path) -> None:
    """Triton's cache names its files by absolute paths: write them anew for this folder."""
    for group in folder.glob("*/__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def triton_key() -> str:
    """What a cache is valid for: Triton's version and the bytes of its compiler."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are seconds, more than 0 and less than 1e6")
    return value


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    options.add_argument("--tune", type=seconds, metavar="SECONDS")
    options.add_argument("--output", default="device_results")
    chosen, given = options.parse_known_args()
    here, began = Path(__file__).resolve().parent, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mla_kernels_device_") as made:
        work = Path(made)
        parts = [(here / PEERS, work / "peers"), (here / CACHE, work / "cache"), (here / TILES, work / "tiles")]
        threads = [threading.Thread(target=unpack, args=part) for part in parts if part[0].is_file()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        move_cache(work / "cache")
        same = (here / KEY).is_file() and (here / KEY).read_text().strip() == triton_key()
        state = "valid here" if same else "of another Triton: kernels compile here"
        print(f"unpacked in {time.monotonic() - began:.0f} s; the cache of kernels is {state}", flush=True)
        paths = [str(here), str(here / PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(work / "cache"),
            "DG_JIT_CACHE_DIR": str(work / "deep_gemm"), "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1",
        }  # fmt: skip
        found = ["--peers", str(work / "peers")] if (work / "peers").is_dir() else []
        device = [*found, "--output", chosen.output, *given]
        status = subprocess.run([sys.executable, "-m", "mla_kernels", "device", *device], env=environment).returncode
        if chosen.tune is None or status not in (0, 1):
            return status
        stores = sorted(map(str, (work / "tiles").glob("*.jsonl")))
        tune = [
            "--model",
            "all",
            "--budget",
            f"{chosen.tune:g}s",
            "--store",
            os.path.join(chosen.output, "tiles.jsonl"),
        ]
        tune += ["--shortlists", *stores] if stores else []
        command = [sys.executable, "-m", "mla_kernels.autotune", "tune", *tune]
        return subprocess.run(command, env=environment).returncode or status


if __name__ == "__main__":
    sys.exit(main())
