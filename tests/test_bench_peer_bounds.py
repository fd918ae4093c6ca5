"""bench.peer_bounds: a kernel cut out of another library's file, compiled beside this library's."""

from bench import peer_bounds

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


def test_a_kernel_that_a_chip_cannot_take_is_said(monkeypatch, tmp_path, capsys):
    """Compilers stand in: the peer fails where there is no e4m3, and this library's case is the one without it."""
    monkeypatch.setattr(peer_bounds, "of_peer", lambda *_: {"ok": False, "reason": "fp8e4nv not supported"})
    bounds = {"core": 640.0, "serial": 1280.0, "spills": 0}
    monkeypatch.setattr(peer_bounds, "of_ours", lambda kernel, case, chip: ({"BLOCK_H": 16, "BLOCK_N": 64}, bounds))
    peer_bounds.main(["--vllm", str(tmp_path), "--target", "sm_86"])
    printed = capsys.readouterr().out
    assert printed.count("fp8e4nv not supported") == 2 and "v32_decode_fp8" in printed
    assert "busiest unit 10.00, without overlap 20.00 clocks; 0 spills; 132 bytes" in printed
