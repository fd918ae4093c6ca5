"""Other libraries, loaded without their packages' dependencies, and called as their own Python code calls them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from mla_kernels.device.peers.files import find, where


@dataclass
class Peers:
    """What was loaded; None where it was not. ``missing`` says why, ``versions`` which."""

    flashmla: object | None = None
    vllm: object | None = None
    fa3: object | None = None
    sglang: object | None = None
    deepgemm: object | None = None
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def load(
    folder: Path | None, *, device_name: str, stub: bool = False, without: Collection[str] = (),
    begin: Callable[[str], None] = lambda name: None,
) -> Peers:  # fmt: skip
    """Load what is found, but for ``without``; ``begin`` is told which one comes next. ``stub``: over a driver that
    does nothing, so only what is written in Triton."""
    from mla_kernels.device.peers import deepgemm, libraries, sglang

    peers = Peers()
    peers.versions, peers.missing = find(folder)
    makers = {  # SGLang's and DeepGEMM's experts call vLLM's kernels
        "vLLM": ("vllm", libraries.VLLM),
        "FlashMLA": ("flashmla", libraries.FlashMLA),
        "FlashAttention-3": ("fa3", libraries.FlashAttention3),
        "SGLang": ("sglang", lambda root: sglang.SGLang(root, device_name, stub)),
        "DeepGEMM": ("deepgemm", deepgemm.DeepGEMM),
    }
    for name, (attribute, make) in makers.items():
        if name not in peers.versions or (stub and name != "SGLang"):
            continue
        if name in without:
            del peers.versions[name]
            continue
        begin(name)
        try:
            setattr(peers, attribute, make(where(name, folder)))
        except (Exception, SystemExit) as error:  # a library for another torch, CUDA or card: the others are timed
            del peers.versions[name]
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            peers.missing[name] = f"not loaded: {type(error).__name__}: {error}{cause}"[:300]
    return peers
