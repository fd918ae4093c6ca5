"""The catalogue's ops on one backend, in a process of its own: Triton reads once whether it interprets.

Inputs are made on the CPU from a seed that follows from the op's name, by the CPU code whatever the backend, so that
every backend gets the same bits.
"""

import argparse
import concurrent.futures
import contextlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mla_kernels import hopper, launch
from mla_kernels.catalogue import EVERY
from mla_kernels.catalogue.calls import Call
from mla_kernels.targets import emulator
from mla_kernels.targets.service import ToolchainMissing

HOPPER = "hopper-emulated"
BACKENDS = {
    "cpu": "the torch code that CPU tensors run",
    "interpret": "the Triton kernels in Triton's interpreter",
    "npu-emulated": "the kernels' Ascend lowering, executed on the CPU",
    HOPPER: "the source of the Gluon kernels, executed on the CPU",
    "cuda": "the kernels on this machine's GPU",
    "npu": "the kernels on this machine's NPU",
}
"""Backend -> what runs there."""
DEVICES = ("cuda", "npu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 24
MISSING = 2
"""Exit status of a process that lacks a compiler."""

Results = dict[str, dict[str, torch.Tensor]]
"""Row, "op|dtype of its inputs", -> name of a result -> the result, on the CPU."""


def present() -> list[str]:
    """The backends of this machine."""
    return [name for name in BACKENDS if name not in DEVICES or _has(name)]


def _has(device: str) -> bool:
    return hasattr(torch, device) and getattr(torch, device).is_available()


def rows(ops: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """(op, dtype of its inputs) of each row; an op whose types are fixed has one, with its example's dtype."""
    found = []
    for op in ops:
        call = EVERY[op]
        found += [(op, name) for name in dtypes] if call.elements else [(op, "")]
    return found


def inputs(call: Call, op: str, dtype: str, tokens: int) -> dict[str, torch.Tensor]:
    """An op's example, the same on every backend."""
    with launch.on_cpu("torch"):
        torch.manual_seed(zlib.crc32(op.encode()))
        return call.inputs(tokens, DTYPES.get(dtype))


def results(op: str, dtype: str, backend: str, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """An op's results on a backend, by name; empty where ``hopper-emulated`` has no kernel that takes the call.

    Raises:
        ToolchainMissing: ``npu-emulated`` without the Ascend compilers.
    """
    call = EVERY[op]
    tensors = inputs(call, op, dtype, tokens)
    device = backend if backend in DEVICES else "cpu"
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    with _mode(backend), torch.no_grad(), hopper.launches() as launched:
        try:
            returned = call.run(**moved)
        except NotImplementedError as refusal:
            if backend != HOPPER or "hopper.variants" not in str(refusal):
                raise
            return {}
    if backend == HOPPER and not launched:
        return {}
    return {name: result.cpu().clone() for name, result in call.named(returned).items()}  # parts may share bytes


@contextlib.contextmanager
def _mode(backend: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if backend not in DEVICES:
            stack.enter_context(launch.on_cpu("torch" if backend == "cpu" else backend))
        stack.enter_context(hopper.variants("force" if backend == HOPPER else "listed"))
        yield


def everywhere(
    wanted: Sequence[tuple[str, str]],
    backends: Sequence[str],
    tokens: int = TOKENS,
    done: Callable[[str], None] = lambda backend: None,
) -> dict[str, Results]:
    """Backend -> its results, each backend in a process of its own, two at a time.

    Raises:
        ToolchainMissing: ``npu-emulated`` is asked for and the Ascend compilers are missing.
        RuntimeError: an op failed on a backend; with what it said.
    """

    def one(backend: str) -> Results:
        with tempfile.TemporaryDirectory(prefix="mla_kernels_agree_") as folder:
            path = Path(folder) / "results.pt"
            names = [f"{op}|{dtype}" for op, dtype in wanted]
            command = [sys.executable, "-m", "mla_kernels.agreement.run", backend, str(tokens), str(path), *names]
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            if backend not in DEVICES:
                environment["TRITON_INTERPRET"] = "1"
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            if ran.returncode == MISSING:
                raise ToolchainMissing(ran.stderr.strip())
            if ran.returncode:
                raise RuntimeError(f"{backend}: {ran.stderr.strip()[-2000:]}")
            found = torch.load(path)
        done(backend)
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(backends, pool.map(one, backends), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """BACKEND TOKENS FILE ROW...: writes the results of the rows."""
    made = argparse.ArgumentParser(prog="python -m mla_kernels.agreement.run", description=main.__doc__)
    made.add_argument("backend", choices=BACKENDS)
    made.add_argument("tokens", type=int)
    made.add_argument("file", type=Path)
    made.add_argument("rows", nargs="+")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)  # how a product is split over threads decides its order of summation
    emulator.OPTIMISE = False  # compiles faster, and computes the same
    try:
        found = {row: results(*row.split("|"), options.backend, options.tokens) for row in options.rows}
    except ToolchainMissing as missing:
        print(missing, file=sys.stderr)
        return MISSING
    torch.save(found, options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
