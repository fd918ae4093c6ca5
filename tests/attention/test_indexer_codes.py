"""The indexer with queries as e4m3 codes, their scales in the heads' weights: every op, against values and formulas."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.indexer.forward import INDEXER_LOGITS
from mla_kernels.attention.indexer.op import indexer_logits
from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.quant.fp8 import AS_FNUZ
from mla_kernels.reference import indexer as reference
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel
from tests.attention.indexer_problems import accepted, make_paged, make_ragged
from tests.support import assert_close, repeats

E4M3 = torch.float8_e4m3fn
LENGTHS = (65, 0, 1, 130)
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""Those of opcheck that compute nothing of their own on float8, which torch does not multiply."""


def test_the_formula_of_fp8_mqa_logits(backend, device):
    """DeepGEMM's, as its tests state it: keys and queries as codes, one scale a key, that of a query in its weight."""
    problem = make_ragged(6, 80, heads=16, head_dim=64, dtype=E4M3, fp8=True, device=device)
    q, k = problem.q.cpu().double(), problem.k.cpu().view(E4M3).double()
    scale, weights = problem.k_scale.cpu().double().nan_to_num(), problem.weights.cpu().double()
    scores = torch.relu(torch.einsum("thd,sd->hts", q, k * scale[:, None]))  # [heads, tokens, keys]
    exact = (scores * weights.t()[..., None]).sum(0)
    key, starts, ends = torch.arange(80), problem.starts.cpu()[:, None], problem.ends.cpu()[:, None]
    exact = exact.masked_fill((key < starts) | (key >= ends), -float("inf"))
    logits = problem.run()
    assert_close(logits, exact, accepted=accepted(problem.q, logits))


def test_codes_score_as_their_values(backend, device):
    """Queries in float32 of the same values, keys the same codes; and a key's codes in either dtype."""
    problem = make_ragged(dtype=E4M3, fp8=True, device=device)
    logits, plain = problem.run(), problem.run(q=problem.q.float())
    assert_close(logits, plain.cpu().double(), accepted=accepted(problem.q, logits))
    assert torch.equal(problem.run(k=problem.k.view(E4M3)), logits)


def test_quantised_queries_end_to_end(backend, device):
    """Values of few bits are codes exactly: quantised or not, the scores are the same."""
    problem = make_ragged(dtype=torch.float32, fp8=True, device=device)
    problem.q = torch.randint(-15, 16, problem.q.shape, device=device).float() * 2.0**-9
    codes, weights = quantise_indexer_query(problem.q, problem.weights)
    logits = problem.run(q=codes, weights=weights)
    assert_close(logits, problem.expected(), accepted=accepted(codes, logits))


def test_selected_keys(backend, device):
    problem = make_ragged(5, 200, heads=20, dtype=E4M3, fp8=True, device=device)
    assert torch.equal(problem.select(11).cpu(), reference.indexer_topk(problem.run().cpu(), 11))


@pytest.mark.parametrize("page_size, queries, limits", [(16, 2, False), (61, 1, False), (64, 3, True)])
def test_selected_slots(backend, device, page_size, queries, limits):
    shape = {"queries": queries, "page_size": page_size, "limits": limits}
    problem = make_paged(LENGTHS, dtype=E4M3, layout="fp8", device=device, **shape)
    logits, got = problem.run(), problem.select(40).cpu()
    problem.check(logits)
    positions = reference.indexer_topk(logits.cpu().flatten(0, 1), 40).view(len(LENGTHS), queries, 40).long()
    page = torch.stack([row[(own // page_size).clamp_min(0)] for row, own in zip(problem.block_table.cpu(), positions)])
    assert torch.equal(got, torch.where(positions < 0, -1, page * page_size + positions % page_size).int())


def test_the_same_bits_every_time_in_any_batch_and_of_any_stride(backend, device):
    paged = make_paged(LENGTHS, queries=2, dtype=E4M3, layout="fp8", device=device)
    logits, slots = paged.run(), paged.select(20)
    for _ in repeats(device):
        assert torch.equal(paged.run(), logits) and torch.equal(paged.select(20), slots)
    for index in range(len(LENGTHS)):
        alone = paged.sequence(index)
        assert torch.equal(alone.run()[0], logits[index]) and torch.equal(alone.select(20)[0], slots[index])
    ragged = make_ragged(dtype=E4M3, fp8=True, device=device)
    heads_first = ragged.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ragged.run(q=heads_first), ragged.run())


def test_nothing_to_do(backend, device):
    problem = make_ragged(dtype=E4M3, fp8=True, device=device)
    none = problem.tokens(slice(0, 0))
    assert none.run().shape == (0, 70) and none.select(3).shape == (0, 3)
    assert (make_paged([0, 0], dtype=E4M3, layout="fp8", device=device).select(3) == -1).all()


def test_codes_go_with_codes():
    ragged, paged = make_ragged(), make_paged([70, 3])
    for call in (indexer_logits, lambda **given: select_keys(**given, top_k=3)):
        with pytest.raises(ValueError, match="k_scale: got None, queries of float8_e4m3fn go with codes"):
            call(**{**vars(ragged), "q": ragged.q.to(E4M3)})
    with pytest.raises(TypeError, match="q: got dtype float8_e4m3fn, accepted: float32"):
        select_slots(**{**vars(paged), "q": paged.q.to(E4M3)}, top_k=3)


def test_opcheck_and_compile():
    ragged, paged = make_ragged(dtype=E4M3, fp8=True), make_paged(LENGTHS, queries=2, dtype=E4M3, layout="fp8")
    operators = torch.ops.mla_kernels
    keys = tuple(vars(ragged).values())
    cached = (paged.q, paged.cache.data, 32, paged.weights, paged.block_table, paged.seq_lens)
    with launch.on_cpu("torch"):
        for op, args in ((operators.select_keys, (*keys, 5)), (operators.select_slots, (*cached, 5))):
            torch.library.opcheck(op.default, args, test_utils=CHECKS)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(q, weights, cache, table, lengths):
            return select_slots(*quantise_indexer_query(q, weights)[:1], cache, weights, table, lengths, 5)

        q = torch.randn(len(LENGTHS), 2, 16, 32)
        codes, _ = quantise_indexer_query(q, paged.weights)
        got = step(q, paged.weights, paged.cache, paged.block_table, paged.seq_lens)
        assert torch.equal(got, select_slots(codes, paged.cache, *list(vars(paged).values())[2:5], 5))


@pytest.mark.parametrize("chip", CHIPS)
def test_matrix_units_that_have_e4m3_multiply_codes(chip):
    """E4M3 follows from the chip; the tile of another chip's kind is refused."""
    case = next(one for one in INDEXER_LOGITS.cases if one.name == "v32_prefill_codes")
    chip = CHIPS[chip]
    tile = INDEXER_LOGITS.rule(chip, "bf16", case.statics, case.sizes)
    assert tile["E4M3"] == (AS_FNUZ.value if chip.dot_fnuz else chip.dot_e4m3)
    for form in {1, 2, 3} - {tile["E4M3"]}:
        other = INDEXER_LOGITS.memory(chip, "bf16", case.statics, tile | {"E4M3": form})
        assert all(size > chip.memory[name] for name, size in other.items())


def test_hopper_multiplies_codes_on_tensor_cores_without_waste():
    case = next(one for one in INDEXER_LOGITS.cases if one.name == "v32_prefill_codes")
    chip = CHIPS["sm_90"]
    tile = INDEXER_LOGITS.rule(chip, "bf16", case.statics, case.sizes)
    report = compile_kernel(INDEXER_LOGITS, chip, "bf16", case.statics, tile)
    assert report.ok and report.spills == 0, report.problem
    shapes = report.detail["loop_tensor_shapes"]
    assert shapes, report.detail
    issued = 0
    for shape, times in shapes.items():
        m, n, k = map(int, shape.partition(".")[2].split("x"))
        assert k == 32  # of 8 bits; of 16 bits it is 16
        issued += m * n * k * times * tile["num_warps"] // 4
    assert issued == tile["BLOCK_N"] * tile["BLOCK_H"] * 128
