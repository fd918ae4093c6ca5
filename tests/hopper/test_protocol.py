"""Faults put into the Hopper kernels' protocol, each of which the emulator must find.

The kernels' source is edited as text and executed: once with each statement that orders something left out, and once
with each of a list of other faults. A fault shows as a deadlock, as accesses that nothing orders, or as wrong numbers.
"""

import importlib.util
import sys
import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.decode import forward
from mla_kernels.hopper.decode import HOPPER_MLA_DECODE, HOPPER_MLA_DECODE_FEW_ROWS
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from mla_kernels.tiles import Kept
from tests.attention.problems import make
from tests.attention.test_decode import unchecked

MANY, FEW = HOPPER_MLA_DECODE, HOPPER_MLA_DECODE_FEW_ROWS
HEADS = {MANY: 40, FEW: 15}
ORDERING = (
    "mbarrier.wait(", "mbarrier.arrive(", "mbarrier.expect(", "fence_async_shared()", "warpgroup_mma_wait(",
    "clear_unread(",
)  # fmt: skip
NEEDLESS_HERE = {
    MANY: (
        "mbarrier.wait(signals.index(RIGHT_ISSUED), phase)",  # only sets a pace
        # The even group fences between ODD_WEIGHTS and its product, too. That serves as well; it need not stay so.
        "fence_async_shared()  # for the even group's product",
        "fence_async_shared()  # what follows uses the barriers just made",  # the emulator's barriers need none
    ),
    FEW: (
        "fence_async_shared()  # the cleared rows",  # another follows
        "fence_async_shared()  # what follows uses the barriers just made",
    ),
}
"""Statements without which the emulator finds nothing wrong."""


def load(text: str, folder):
    path = folder / "mutant.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"mutant_{abs(hash(text))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def found(kernel, text: str, problem, folder, monkeypatch) -> bool:
    """Whether a kernel of this source goes wrong."""
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), kernel.name)))
    try:
        with on_cpu("hopper-emulated"), hopper.variants("force"):
            problem.check(unchecked(problem))
    except (EmulationError, AssertionError):
        return True
    return False


def plain_problem(kernel, **options):
    return make([449, 300], heads=HEADS[kernel], **dict(dtype=torch.bfloat16, latent_dim=256, rope_dim=32) | options)


def full_problem(kernel):
    """With masks and a page that is none."""
    problem = plain_problem(kernel, queries=2 if kernel is FEW else 3, window=390)
    problem.cache.data[1:].nan_to_num_()
    problem.block_table[1, 3] = -1
    return problem


@pytest.fixture(autouse=True)
def two_splits(monkeypatch):
    monkeypatch.setattr(forward, "split_count", lambda keys, programs, cores: 2)
    monkeypatch.setattr(forward.MLA_DECODE, "kept", Kept())


@pytest.mark.parametrize("problem", [plain_problem, full_problem])
@pytest.mark.parametrize("kernel", [MANY, FEW], ids=["many rows", "few rows"])
def test_the_kernel_itself_is_right(kernel, problem, tmp_path, monkeypatch):
    assert not found(kernel, kernel.source, problem(kernel), tmp_path, monkeypatch)


@pytest.mark.parametrize("kernel", [MANY, FEW], ids=["many rows", "few rows"])
def test_every_statement_that_orders_something_is_needed(kernel, tmp_path, monkeypatch):
    lines, problem = kernel.source.splitlines(), plain_problem(kernel)
    survivors = []
    for number, line in enumerate(lines):
        statement = line.strip()
        if not any(name in line for name in ORDERING) or statement.startswith(("def ", "from ")):
            continue
        indent = line[: len(line) - len(line.lstrip())]
        without = f"{indent}pass" if statement.startswith(ORDERING) else line.replace("_wait(0", "_wait(9")
        assert without != line, f"left as it is: {statement}"
        if not found(
            kernel, "\n".join([*lines[:number], without, *lines[number + 1 :]]), problem, tmp_path, monkeypatch
        ):
            survivors.append(statement)
    assert sorted(survivors) == sorted(NEEDLESS_HERE[kernel])


FAULTS = {
    MANY: {
        "a barrier's phase never changes": ("phase = pair & 1", "phase = 0", 2),
        "left half reloaded before its product is done": (
            "        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]\n"
            "        load_half(key_tiles, even_next, after % PAGE_SIZE, 0, left, left_full, more)\n",
            "        load_half(key_tiles, even_next, after % PAGE_SIZE, 0, left, left_full, more)\n"
            "        acc = warpgroup_mma_wait(0, [acc])\n",
            1,
        ),
        "the block after the last one is loaded": ("more = pair + 1 < pairs", "more = pair < pairs", 2),
        "weights of the even block are not scaled": ("(weights * keep[:, None]).to(", "weights.to(", 1),
        "the sum is not scaled": ("        total = total * keep\n", "", 1),
        "the output is not scaled": ("        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]\n", "", 3),
        "the odd group takes its own maximum alone": ("gl.maximum(even_max.load(ROW), own)", "own", 1),
        "pages of the even and the odd block are exchanged": (
            "load_half(key_tiles, odd_next, (after + BLOCK) % PAGE_SIZE, HALF, right",
            "load_half(key_tiles, even_next, (after + BLOCK) % PAGE_SIZE, HALF, right",
            1,
        ),
        "a page outside the cache is attended to": ("| (not valid):", ":", 2),
        "keys behind the end are attended to": ("seen = (key < end)[None, :]", "seen = (key < end + 64)[None, :]", 1),
        "a key that is not seen yet is attended to": ("limit = newest + (row", "limit = newest + 1 + (row", 1),
        "the window is one key too wide": ("(limit - window)[:, None]", "(limit - window - 1)[:, None]", 1),
        "rows of queries are stored beyond the last": ("limit)[:, None])", "limit + 1)[:, None])", 1),
    },
    FEW: {
        "a barrier's phase never changes": ("phase = block // STAGES & 1", "phase = 0", 1),
        "a stage is reloaded with the page after": ("page_later, after, keys", "page_after, after, keys", 1),
        "the block after the last one is loaded": ("block + 2 < blocks", "block + 1 < blocks", 1),
        "sums are not scaled": ("sums * keep[None, :] + weights", "sums + weights", 1),
        "the output is not scaled": ("        acc = acc * keep[None, :]\n", "", 1),
        "a page outside the cache is attended to": ("| (not valid):", ":", 1),
        "keys behind the end are attended to": ("gl.where(valid, end, first))[:, None]", "end + 64)[:, None]", 1),
        "a key that is not seen yet is attended to": ("limit = newest + (row", "limit = newest + 1 + (row", 1),
        "the window is one key too wide": ("(limit - window)[None, :]", "(limit - window - 1)[None, :]", 1),
        "rows of queries are stored beyond the last": ("stored_rows)[None, :])", "stored_rows + 1)[None, :])", 2),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "kernel, fault", [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]],
    ids=lambda value: value if isinstance(value, str) else {MANY: "many rows", FEW: "few rows"}[value],
)  # fmt: skip
def test_a_fault_is_found(kernel, fault, tmp_path, monkeypatch):
    before, after, times = FAULTS[kernel][fault]
    assert kernel.source.count(before) == times
    assert found(kernel, kernel.source.replace(before, after), full_problem(kernel), tmp_path, monkeypatch)
