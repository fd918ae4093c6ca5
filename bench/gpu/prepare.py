"""``python -m mla_kernels.device.prepare FOLDER``: a folder for a machine with a Hopper GPU and no network.

It holds the last commit of this checkout, pytest, the peers that get_peers brought (``--peers``) and Triton's cache of
what the cases launch with the tiles of ``--tiles-of``, compiled here over a driver that does nothing. With ``--tune``
also shortlists of tiles for models, and their code. No GPU is needed; torch, Triton and Python must be the versions of
the machine with the GPU, or that machine compiles by itself. There: ``python FOLDER/run.py`` takes the arguments of
``python -m mla_kernels device``, and ``--tune``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import mla_kernels
from mla_kernels.device import queue as children
from mla_kernels.device import run_packed
from mla_kernels.device.cases import CASES
from mla_kernels.device.peers import files
from mla_kernels.targets import devices

MOST_BYTES = 64 << 20
CHECKOUT = ("mla_kernels", "autotune", "reference", "bench/gpu", "tests", "pyproject.toml", "LICENSE")
INSTALLED = {"autotune": "autotune", "reference": "reference", "bench/gpu": "device"}
"""Folder of the checkout -> its name in the package."""
PACKAGES = ("einops", "pytest", "pytest-xdist", "pytest-timeout", "pytest-benchmark", "rich")
STUB = "tests/launch/stub_libcuda.c"
COMPILE_SECONDS = 3600.0
QUIET_SECONDS = 600.0


class Failed(RuntimeError):
    """What could not be prepared; the message says why."""


def checkout(root: Path, folder: Path) -> None:
    """The last commit as a package that can be imported from ``folder``, with its tests."""
    if shutil.which("git") is None or not (root / ".git").exists():
        raise Failed(f"{root} is no checkout of git: the folder is made from a commit")
    for name in ("mla_kernels", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
    archive = subprocess.run(["git", "-C", str(root), "archive", "HEAD", *CHECKOUT], stdout=subprocess.PIPE)
    if archive.returncode:
        raise Failed("git archive HEAD: see its message above")
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    for source, name in INSTALLED.items():
        shutil.move(folder / source, folder / "mla_kernels" / name)
    (folder / "bench").rmdir()
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    (folder / "COMMIT").write_text(commit.stdout)


def packages(root: Path, folder: Path) -> None:
    """pytest, and what else the tests and the tuner import, for any Python: none of it is compiled."""
    target = folder / "packages"
    shutil.rmtree(target, ignore_errors=True)
    constraints = ["--constraint", str(root / "constraints.txt")] if (root / "constraints.txt").is_file() else []
    found = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--target",
         str(target), *constraints, *PACKAGES], capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise Failed(f"pip install {' '.join(PACKAGES)}: {found.stderr.strip()[-500:]}")


def stub(source: Path, folder: Path) -> dict[str, str]:
    """Build the driver that does nothing; the environment of who runs over it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Failed("the stub driver needs a C compiler: cc or gcc")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


def compile_cases(
    known, folder: Path | None, tiles_of: str, environment: dict[str, str], *, log: Path | None = None, workers: int = 2
) -> list[dict]:
    """Launch every contestant that is written in Triton over the stub; the records of the cases."""
    over = ["env", *(f"{name}={value}" for name, value in environment.items())]

    def start(without):
        command = children.command("stub", folder, "--warm", "--tiles-of", tiles_of, without=without)
        return children.Child([*over, *command], log)

    runs, threads = [], []
    for number in range(workers):
        run = children.Run(start, time.monotonic() + COMPILE_SECONDS, quiet=QUIET_SECONDS)
        runs.append(run)
        threads.append(threading.Thread(target=run.all, args=(known[number::workers],), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    broken = [run.broken for run in runs if run.broken]
    if broken:
        raise Failed(f"{broken[0]}; its messages are in {log}")
    return [record for run in runs for record in run.records]


def shortlists(device: str, models: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
    """Choose the tiles that are timed for models on a device, and compile them, too."""
    command = [sys.executable, "-m", "mla_kernels.autotune", "tune", "--offline", "--launchable", "--target", device]
    command += ["--model", *models, "--store", str(folder / f"{device}.jsonl")]
    with open(log, "a") as file:
        done = subprocess.run(command, env=os.environ | environment, stderr=file)
    if done.returncode not in (0, 1):  # 1: a kernel has no tile for some sizes, which the log names
        raise Failed(f"{' '.join(command[2:])} ended with status {done.returncode}; its messages are in {log}")


def check_models(device: str, models: list[str]) -> None:
    """Failed says what keeps these models from being tuned; found before anything is written or compiled."""
    with tempfile.TemporaryDirectory(prefix="mla_kernels_prepare_") as made:
        command = [sys.executable, "-m", "mla_kernels.autotune", "tune", "--offline", "--budget", "0"]
        command += ["--target", device, "--model", *models, "--store", str(Path(made) / "tiles.jsonl")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"--tune {' '.join(models)}: {done.stderr.strip()[-1000:]}")


def pack(source: Path, archive: Path) -> None:
    """A folder as a compressed archive, written under another name first."""
    half = archive.with_suffix(".half")
    with tarfile.open(half, "w:xz") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name)
    half.replace(archive)


def without_sources(cache: Path) -> None:
    """Leave out Triton's text of each kernel, which no launch reads."""
    for path in cache.glob("*/*.source"):
        path.unlink()
    for group in cache.glob("*/__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        kept = {name: path for name, path in names.items() if not name.endswith(".source")}
        group.write_text(json.dumps({"child_paths": kept}))


def prepare(
    root: Path, folder: Path, others: Path | None, tiles_of: list[str], models: list[str] | None = None, say=print
) -> None:
    if models:
        check_models(tiles_of[0], models)
    folder.mkdir(parents=True, exist_ok=True)
    checkout(root, folder)
    packages(root, folder)
    shutil.copy(run_packed.__file__, folder / "run.py")
    began = time.monotonic()
    for name in (run_packed.PEERS, run_packed.TILES):
        (folder / name).unlink(missing_ok=True)
    if others is not None:
        say(f"packing the peers of {others}")
        pack(others, folder / run_packed.PEERS)
    with tempfile.TemporaryDirectory(prefix="mla_kernels_prepare_") as made:
        work = Path(made)
        cache = work / "cache"
        environment = stub(folder / STUB, work / "stub") | {
            "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1",
            "TRITON_STORE_BINARY_ONLY": "1",
        }  # fmt: skip
        if (folder / run_packed.CACHE).is_file():  # from before: what is still valid is not compiled again
            run_packed.unpack(folder / run_packed.CACHE, cache)
            run_packed.move_cache(cache)
        for name in tiles_of:
            say(f"compiling {len(CASES)} cases with the tiles of {name}")
            records = compile_cases(CASES, others, name, environment, log=folder / "prepare.log")
            for record in records:
                for one in record["contestants"]:
                    if "problem" in one:
                        say(f"{record['case']}, {one['name']}: {one['problem']}")
                if record["problem"]:
                    say(f"{record['case']}: {record['problem']}")
        if models:
            for name in tiles_of:
                say(f"choosing and compiling the tiles that are timed on {name} for {', '.join(models)}")
                shortlists(name, models, work / "tiles", environment, folder / "prepare.log")
            pack(work / "tiles", folder / run_packed.TILES)
        without_sources(cache)
        pack(cache, folder / run_packed.CACHE)
    (folder / run_packed.KEY).write_text(run_packed.triton_key() + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = f"{size / 2**20:.1f} MiB in {time.monotonic() - began:.0f} s"
    say(f"{folder}: {said}; there: python {folder.name}/run.py --seconds 240{' --tune 240' if models else ''}")
    if size > MOST_BYTES:
        raise Failed(f"{folder} has {size / 2**20:.1f} MiB, more than {MOST_BYTES >> 20}: get_peers --capability 9.0")


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m mla_kernels.device.prepare", description=__doc__.splitlines()[0])
    made.add_argument("folder", type=Path, metavar="FOLDER")
    made.add_argument("--peers", type=Path, metavar="FOLDER", help="what get_peers filled")
    made.add_argument(
        "--tiles-of", nargs="+", default=["h100", "h200"], metavar="DEVICE",
        choices=[name for name, chip in devices.DEVICES.items() if chip.name == "sm_90"],
        help="devices of capability 9.0 (default h100 h200)",
    )  # fmt: skip
    made.add_argument(
        "--tune", nargs="+", metavar="MODEL", help="models whose tiles will be timed; all: the known ones"
    )
    chosen = made.parse_args(arguments)
    if chosen.folder.exists() and not chosen.folder.is_dir():
        made.error(f"{chosen.folder} is no folder")
    if chosen.peers is not None and not (chosen.peers / files.MANIFEST).is_file():
        made.error(
            f"--peers {chosen.peers}: no {files.MANIFEST} there; python -m mla_kernels.device.get_peers fills it"
        )
    root = Path(mla_kernels.__file__).parents[1]
    others = chosen.peers.resolve() if chosen.peers else None
    try:
        prepare(root, chosen.folder.resolve(), others, chosen.tiles_of, chosen.tune)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
