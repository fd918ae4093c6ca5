"""``python -m tests.bundle.refusals_child BUNDLE``: copies of a bundle, each spoilt in one way, are loaded.

Prints as JSON {"refused": {case: [words that must be in the message, message]}}, and what Triton compiled at the launch
that noticed a bundle for another chip.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import triton

import tests.launch.cuda_recorder  # noqa: F401  (puts the stub driver under Triton)
from mla_kernels import bundle, route
from mla_kernels.bundle import manifest
from mla_kernels.launch import on_cpu


def edit(folder: Path, change) -> None:
    found = json.loads((folder / manifest.NAME).read_text())
    change(found)
    (folder / manifest.NAME).write_text(json.dumps(found))


def first_file(folder: Path) -> Path:
    return next(path for path in sorted((folder / manifest.FOLDER).rglob("*.cubin")))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


CASES = {
    "package": ("built with mla_kernels 0.0.1", lambda f: edit(f, lambda m: m.update(mla_kernels="0.0.1"))),
    "triton": ("built with triton 3.0.0", lambda f: edit(f, lambda m: m["toolchain"].update(triton="3.0.0"))),
    "settings": (
        "DISABLE_LLVM_OPT was '1' when it was built and is not set here",
        lambda f: edit(f, lambda m: m["toolchain"]["settings"].update(DISABLE_LLVM_OPT="1")),
    ),
    "family": (
        "it is for ROCm (MI300X), kernels are launched through CUDA",
        lambda f: edit(f, lambda m: m["target"].update(vendor="amd", part="MI300X")),
    ),
    "source": (
        "the source differs of route_kernel (0123",
        lambda f: edit(f, lambda m: m["sources"].update(route_kernel={"hash": "0123", "triton": "4567"})),
    ),
    "kernel": (
        "the source differs of old_kernel (no such kernel)",
        lambda f: edit(f, lambda m: m["sources"].update(old_kernel={"hash": "0", "triton": "0"})),
    ),
    "damaged": ("is damaged: its hash is not the manifest's", lambda f: cut(first_file(f))),
    "missing": ("cannot be read (No such file", lambda f: first_file(f).unlink()),
    "format": ("has format 7, 1 is accepted", lambda f: edit(f, lambda m: m.update(format=7))),
    "no manifest": ("manifest.json cannot be read", lambda f: (f / manifest.NAME).unlink()),
    "no json": ("manifest.json is no JSON", lambda f: cut(f / manifest.NAME) or cut(f / manifest.NAME)),
    "another vendor": (
        "it is for intel (H100-SXM5-80GB), kernels are launched through CUDA",
        lambda f: edit(f, lambda m: m["target"].update(vendor="intel")),
    ),
    "a part less": (
        "manifest.json is damaged: toolchain.digest is missing, not str",
        lambda f: edit(f, lambda m: m["toolchain"].pop("digest")),
    ),
    "unfinished": ("run its finish.py", lambda f: edit(f, lambda m: m["kernels"][0].update(key=None))),
}


def main(path: str) -> dict:
    refused, compiled, warnings = {}, [], []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: None if cache_hit else compiled.append(src.name)
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mla_kernels.bundle").addHandler(handler)
    with tempfile.TemporaryDirectory() as made:
        for name, (expected, spoil) in CASES.items():
            folder = Path(made) / name
            shutil.copytree(path, folder)
            spoil(folder)
            try:
                bundle.load(folder)
                refused[name] = expected, "it was loaded"
            except bundle.BundleRefused as error:
                refused[name] = expected, str(error)
        os.environ["MLA_KERNELS_BUNDLE"] = str(Path(made) / "damaged")
        assert bundle.load_named() == [] and "is damaged" in warnings.pop(), warnings
        folder = Path(made) / "another chip"
        shutil.copytree(path, folder)
        edit(folder, lambda m: m["target"].update(architecture="100", part="B200"))
        other = bundle.load(folder)
        with on_cpu("cuda", "h100"):
            route(torch.empty(2, 256), 8, bias=torch.empty(256), scoring="sigmoid", num_groups=8, top_k_groups=4)
        assert warnings and "it is for B200 (100), this device is cuda 90" in warnings[0], warnings
        assert not other.found
    return {"refused": refused, "compiled after a bundle for another chip": compiled}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
