"""Keys that are codes, taken four at a time: the logits of keys taken byte by byte, for every code."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.indexer.forward import INDEXER_LOGITS
from mla_kernels.attention.indexer.op import indexer_logits
from mla_kernels.quant.fp8 import AS_BYTES
from tests.attention.indexer_problems import E4M3, make_paged, make_ragged

BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture
def forms(monkeypatch):
    seen, run = [], INDEXER_LOGITS.launch

    def spy(chip, work, args, statics, tile):
        seen.append(tile["E4M3"])
        run(chip, work, args, statics, tile)

    monkeypatch.setattr(INDEXER_LOGITS, "launch", spy)
    return seen


def moved(codes):
    """The same codes in rows one byte longer."""
    longer = torch.full((codes.shape[0], codes.shape[1] + 1), 0x7F, dtype=torch.uint8)
    longer[:, :-1] = codes.view(torch.uint8)
    return longer[:, :-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, E4M3], ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_words_give_the_bits_of_bytes(target, dtype, forms):
    problem = make_ragged(keys=70, heads=16, head_dim=32, dtype=dtype, fp8=True)
    problem.k = BYTES.repeat(9)[: 70 * 32].view(70, 32)[torch.randperm(70)].contiguous()
    with launch.on_cpu("interpret", target):
        actual = problem.run()
        apart = indexer_logits(**vars(problem) | {"k": moved(problem.k)})
    in_words = not (dtype == E4M3 and target == "sm_90")
    assert not in_words or (forms[0] > 1 and forms[1] == AS_BYTES.value)
    nan = apart.isnan() & actual.isnan() if not in_words else torch.zeros_like(apart, dtype=torch.bool)
    assert torch.equal(actual[~nan], apart[~nan])


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
def test_pages_with_nan_where_nobody_looks(target, dtype):
    problem = make_paged([0, 1, 63, 64, 65], heads=16, page_size=16, dtype=dtype, layout="fp8")
    with launch.on_cpu("interpret", target):
        problem.check(problem.run())
