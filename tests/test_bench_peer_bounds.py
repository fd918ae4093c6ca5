"""bench.peer_bounds: a kernel cut out of another library's file, compiled beside this library's."""

from types import SimpleNamespace

import pytest

from bench import peer_bounds
from mla_kernels.targets.chips import CHIPS

SOURCE = '''import triton


@triton.jit
def other(x):
    pass


@triton.jit
def wanted(
    x_ptr,
    SIZE: tl.constexpr,
):
    """With an empty line."""
    y = 1

    tl.store(x_ptr, y)


def launch():
    pass
'''


def test_one_kernel_is_cut_out():
    text = peer_bounds.kernel_text(SOURCE, "wanted")
    assert text.startswith("import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef wanted(")
    assert text.endswith("    tl.store(x_ptr, y)\n") and "other" not in text and "launch" not in text


BOUNDS = {"core": 640.0, "serial": 1280.0, "spills": 0, "loop_spills": 0}


def test_a_kernel_that_a_chip_cannot_take_is_said(monkeypatch, tmp_path, capsys):
    """Compilers stand in: the peer fails where there is no e4m3, and this library's case is the one without it."""
    failed = {"ok": False, "reason": "fp8e4nv not supported"}
    monkeypatch.setattr(peer_bounds, "of_peer", lambda *_: ({}, failed))
    monkeypatch.setattr(peer_bounds, "of_ours", lambda *_: ({"BLOCK_H": 16, "BLOCK_N": 64}, BOUNDS))
    peer_bounds.main(["--vllm", str(tmp_path), "--target", "sm_86"])
    printed = capsys.readouterr().out
    assert printed.count("fp8e4nv not supported") == 2 and "v32_decode_fp8" in printed and "sglang" not in printed
    assert "busiest unit 10.00, without overlap 20.00 clocks; 0 spills, 0 in the loop; 132 bytes" in printed


def test_the_first_tile_that_fits_is_compared(monkeypatch, tmp_path):
    """SGLang's prefill takes smaller tiles until one fits; the compiler here needs 1 KiB a key and stage."""
    jobs = []

    class Pool:
        def submit(self, kind, job):
            jobs.append((job["constexprs"]["BLOCK_N"], job["options"]["num_stages"]))
            answer = {"ok": True, "memory": {"shared": jobs[-1][0] * jobs[-1][1] << 10}}
            return SimpleNamespace(result=lambda: answer)

    path = tmp_path / peer_bounds.SGLANG_SPARSE["file"]
    path.parent.mkdir(parents=True)
    path.write_text(SOURCE.replace("wanted", peer_bounds.SGLANG_SPARSE["function"]))
    monkeypatch.setattr(peer_bounds.service, "pool", Pool)
    blocks, answer = peer_bounds.of_peer(peer_bounds.SGLANG_SPARSE, tmp_path, CHIPS["sm_120"])
    assert jobs == [(64, 2), (32, 2)] and answer["ok"] and (blocks["BLOCK_N"], blocks["num_warps"]) == (32, 4)
    assert peer_bounds.of_peer(peer_bounds.SGLANG_SPARSE, tmp_path, CHIPS["sm_80"])[0]["num_stages"] == 2
    assert jobs[2:] == [(64, 3), (64, 2)]


def test_an_engine_must_be_given(capsys):
    with pytest.raises(SystemExit):
        peer_bounds.main([])
    assert "--vllm or --sglang: neither is given" in capsys.readouterr().err
