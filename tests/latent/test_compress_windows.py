"""compress_windows on every backend: entries, gradients, refusals, and that nothing depends on the batch."""

import pytest
import torch

import mla_kernels as mk
from mla_kernels.latent.windows.compress import compress_windows
from mla_kernels.reference import windows as reference
from tests.latent.window_problems import KINDS, Problem, packed, tokens_of
from tests.support import assert_close, not_on

LEAVES = ("kv", "gate", "position_bias", "norm_weight")
LENGTHS = {"hca": (17, 0, 3, 24), "csa": (5, 0, 3, 22)}


def on(device, given):
    return {name: value.to(device) for name, value in given.items()}


def doubled(given):
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def poison_what_waits(given, ratio):
    """NaN where a sequence's last tokens fill no window."""
    for begin, end in zip(given["cu_seqlens"][:-1].tolist(), given["cu_seqlens"][1:].tolist()):
        given["kv"][end - (end - begin) % ratio : end] = float("nan")
        given["gate"][end - (end - begin) % ratio : end] = float("nan")


@pytest.mark.quick("compress_windows", when=lambda kind, dtype: kind == "csa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries(backend, device, kind, dtype):
    """Ragged sequences, one of them empty, and rows behind the last; NaN in all that no window holds."""
    given, options = packed(kind, LENGTHS[kind], dtype=dtype, gap=9)
    poison_what_waits(given, options["ratio"])
    got, ends = compress_windows(**on(device, given), **options)
    want, want_ends = reference.compress_windows(**doubled(given), **options)
    assert torch.equal(ends.cpu(), want_ends) and got.dtype == dtype
    assert_close(got, want, None if dtype == torch.float32 else want.to(dtype))


def gradients(given, options, weighting):
    leaves = [given[name].detach().requires_grad_() for name in LEAVES]
    out, _ = compress_windows(**{**given, **dict(zip(LEAVES, leaves))}, **options)
    return torch.autograd.grad((out * weighting).sum(), leaves)


@pytest.mark.quick("compress_windows_backward", when=lambda kind, dtype: kind == "csa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(backend, device, kind, dtype):
    """Against float64 autograd; 0, not NaN, for what no window holds; the same bits again."""
    given, options = packed(kind, LENGTHS[kind], dtype=dtype, gap=9)
    poison_what_waits(given, options["ratio"])
    weighting = torch.randn(len(given["kv"]) // options["ratio"], 128).to(dtype)
    got = gradients(on(device, given), options, weighting.to(device))
    again = gradients(on(device, given), options, weighting.to(device))

    def torchs(given, weighting):
        leaves = [given[name].requires_grad_() for name in LEAVES]
        out, _ = reference.compress_windows(**given, **options)
        return [grad.nan_to_num(0.0) for grad in torch.autograd.grad((out * weighting).sum(), leaves)]

    want = torchs(doubled(given), weighting.double())
    for one, other, exact in zip(got, again, want):
        assert torch.equal(one, other) and one.isfinite().all()
        assert_close(one, exact, exact.to(dtype) if one.dtype != torch.float32 else None,
                     accepted=1e-5 if dtype == torch.float32 else 2**-8)  # fmt: skip


@pytest.mark.no_launch("no windows")
def test_no_window(backend, device):
    """Too few tokens for one, and no sequence at all."""
    given, options = packed("hca", (3, 4))
    out, ends = compress_windows(**on(device, given), **options)
    assert out.shape == (0, 128) or not out.any()
    assert ends.tolist() == [0, 0, 0]
    given["cu_seqlens"] = given["cu_seqlens"][:1]
    out, ends = compress_windows(**on(device, {**given, "kv": given["kv"][:0], "gate": given["gate"][:0]}), **options)
    assert out.shape == (0, 128) and ends.tolist() == [0]


def test_gates_of_minus_infinity(backend, device):
    """They have no weight, also where a whole block of tokens has them; a window of nothing else is NaN."""
    given, options = packed("hca", (24,))
    given["gate"][:7] = float("-inf")
    given["gate"][8:16] = float("-inf")
    got, _ = compress_windows(**on(device, given), **options)
    want, _ = reference.compress_windows(**doubled(given), **options)
    assert got[1].isnan().all() and not got[[0, 2]].isnan().any()
    assert_close(got, want)


def test_other_weights_than_float32(backend, device):
    """A norm weight in kv's dtype, and its gradient."""
    given, options = packed("csa", (9,), dtype=torch.bfloat16)
    given["norm_weight"] = given["norm_weight"].bfloat16()
    got, _ = compress_windows(**on(device, given), **options)
    want, _ = reference.compress_windows(**doubled(given), **options)
    assert_close(got, want, want.bfloat16())
    grads = gradients(on(device, given), options, torch.ones_like(got))
    assert grads[3].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_does_not_depend_on_the_batch(backend, device, kind):
    """Sequences alone, from shifted addresses, and in another order."""
    lengths = LENGTHS[kind]
    given, options = packed(kind, lengths)
    given = on(device, given)
    with mk.batch_invariant():
        whole, ends = compress_windows(**given, **options)
        for b in (0, 3):
            rows = slice(*given["cu_seqlens"][b : b + 2].tolist())
            room = given["kv"].new_empty(2, (rows.stop - rows.start) * given["kv"].shape[1] + 1)
            alone = [
                place[1:].view(-1, given["kv"].shape[1]).copy_(given[name][rows])
                for place, name in zip(room, ("kv", "gate"))
            ]
            own = {**given, "kv": alone[0], "gate": alone[1]}
            own["cu_seqlens"] = torch.tensor([0, lengths[b]], dtype=torch.int32, device=device)
            part, _ = compress_windows(**own, **options)
            assert torch.equal(part[: ends[b + 1] - ends[b]], whole[ends[b] : ends[b + 1]])


def test_a_written_entry_does_not_depend_on_the_batch(backend, device):
    """Nor on how a sequence's tokens come: at once, in chunks or one by one."""
    found = []
    for chunks in ((9,), (1, 8), (1,) * 9, (5, 4)):
        torch.manual_seed(3)
        problem = Problem("csa", "indexer", (6, 9), device)
        kv, gate = torch.randn(2, 9, problem.row, device=device)
        own = on(device, problem.weights)
        begin, length = 0, 6
        for count in chunks:
            length += count
            place = [torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, count], [length])]
            with mk.batch_invariant():
                mk.write_windows(
                    kv[begin : begin + count], gate[begin : begin + count], *own.values(), problem.own_state,
                    problem.slots[:1].to(device), *place, problem.table[:1].to(device), problem.cache,
                    ratio=4, overlap=True, max_tokens=count,
                )  # fmt: skip
            begin += count
        found.append(tokens_of(problem.cache))
    assert all(torch.equal(one, found[0]) for one in found)


@not_on("values of CPU tensors are checked", "cpu")
def test_a_device_leaves_out_what_is_out_of_range(backend, device):
    from mla_kernels.latent.windows.compress import _launch

    given, _ = packed("csa", (9, 8))
    given["cu_seqlens"] = torch.tensor([-9, 8, 999, 17], dtype=torch.int32)
    given["cos"], given["sin"] = given["cos"][:4], given["sin"][:4]
    out, _ = _launch(*on(device, given).values(), 4, True, 1e-6)
    assert out.shape == (4, 128) and not out.any()


REFUSED = {
    "ratio": (lambda a: {"ratio": 6}, ValueError, "ratio: got 6, powers of two"),
    "overlap": (lambda a: {"overlap": None}, TypeError, "overlap: got NoneType"),
    "kv": (lambda a: {"kv": a["kv"][:, :128]}, ValueError, "kv: got rows of 128 values, 256 are accepted .*with"),
    "gate": (lambda a: {"gate": a["gate"][1:]}, ValueError, r"gate: got shape \(16, 256\)"),
    "bias": (lambda a: {"position_bias": a["position_bias"].T}, ValueError, r"position_bias: got shape \(256, 4\)"),
    "norm": (lambda a: {"norm_weight": a["norm_weight"].half()}, TypeError, "norm_weight: got dtype float16"),
    "bounds kind": (lambda a: {"cu_seqlens": a["cu_seqlens"].long()}, TypeError, "cu_seqlens: got dtype int64"),
    "no bounds": (lambda a: {"cu_seqlens": a["cu_seqlens"][:0]}, ValueError, "cu_seqlens: got no value"),
    "bounds": (lambda a: {"cu_seqlens": a["cu_seqlens"] + 1}, ValueError, "cu_seqlens: got"),
    "positions": (lambda a: {"cos": a["cos"][:4], "sin": a["sin"][:4]}, ValueError, "cos: got 4 rows, a window begins"),
    "rope": (lambda a: {"cos": a["cos"][:, :5]}, ValueError, "cos: got 5 columns"),
    "eps": (lambda a: {"eps": None}, ValueError, "eps: got None"),
    "gradient": (lambda a: {"cos": a["cos"].requires_grad_()}, NotImplementedError, "no gradient of cos and sin"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, cpu_code):
    changes, error, words = REFUSED[name]
    given, options = packed("csa", (9, 8))
    given = {**given, **options}
    with pytest.raises(error, match=words):
        compress_windows(**{**given, **changes(given)})


def test_no_second_derivative(cpu_code):
    given, options = packed("csa", (9, 8))
    leaf = given["kv"].requires_grad_()
    (gradient,) = torch.autograd.grad(compress_windows(**given, **options)[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="compress_windows has no second derivative"):
        gradient.sum().backward()


def test_opcheck(cpu_code):
    given, options = packed("csa", (9, 8))
    leaves = [given.pop(name).contiguous().requires_grad_() for name in LEAVES]
    torch.library.opcheck(
        torch.ops.mla_kernels.compress_windows.default, (*leaves, *given.values(), *options.values(), 1e-6)
    )
