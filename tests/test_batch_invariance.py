"""Batch invariance of every public op: a row's bits, alone, beside others, anywhere in a batch, from any address."""

import functools
import inspect
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mla_kernels as mk
from mla_kernels.attention.decode import forward as decode
from mla_kernels.attention.sparse import forward as sparse
from mla_kernels.catalogue import CALLS
from mla_kernels.catalogue.calls import Call
from tests.attention.problems import make
from tests.attention.sparse_problems import make_decode
from tests.support import not_on
from tests.test_public_api import SIGNATURES

ROWS = {"cpu": 24, "interpret": 9, "npu-emulated": 9, "cuda": 150, "npu": 150}

SHARED = {"data"}
SHARED_OF = {"indexer_logits": {"k"}, "select_keys": {"k", "k_scale"}, "sparse_mla_prefill": {"kv"}}
"""Tensors that every row reads, though they grow with the number of tokens in the catalogue."""

WITHOUT_ROWS = {
    "dispatch": "sorts: where a pair goes follows from all pairs",
    "permute": "moves rows",
    "align_blocks": "sorts",
    "expert_load and update_bias": "counts tokens",
    "balance_loss": "a sum over the batch",
    "copy_pages": "moves bytes",
    "prefill_rows": "its rows are those of packed sequences",
    "mla_prefill": "its rows are sequences: see test_sequences_of_a_prefill",
    "mla_prefill without causal and k_rope": "as above",
    "compress_windows": "its rows are sequences: see tests/latent/test_compress_windows.py",
    "write_windows": "as above",
}

WITHOUT_KEYWORD = {
    "align_blocks", "convert_cache", "copy_pages", "dispatch", "entry_slots", "expert_load", "gather_tokens",
    "indexer_topk", "permute", "prefill_rows", "quantisation_error", "quantise_indexer_query", "scatter_indexer_keys",
    "scatter_tokens",
    "update_bias", "window_slots", "balance_loss",
}  # fmt: skip
"""They move, count, choose or scale exactly, or (the last) add over a batch."""


def functions():
    return {name for name in mk.__all__ if inspect.isfunction(getattr(mk, name))}


def test_every_function_has_the_keyword_or_adds_nothing_of_a_row():
    with_keyword = {
        name for name in functions() if "batch_invariant" in inspect.signature(getattr(mk, name)).parameters
    }
    assert with_keyword == functions() - WITHOUT_KEYWORD
    assert set(WITHOUT_ROWS) <= set(CALLS) and set(SIGNATURES) >= WITHOUT_KEYWORD


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element past an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)[1:]
    return room.view(tensor.shape).copy_(tensor)


def on(device, tensors):
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


def chosen(call, tensors, rows, move=lambda tensor: tensor):
    """The call's tensors of these rows alone."""
    own = dict(tensors)
    shared = SHARED.union(*(of for name, of in SHARED_OF.items() if CALLS.get(name) is call))
    for name, axes in call.sizes.items():
        for axis, size in axes.items():
            if size == "tokens" and name not in shared:
                own[name] = move(tensors[name].index_select(axis, rows))
    return own


def results(call, tensors) -> tuple[torch.Tensor, ...]:
    found = call.run(**tensors)
    return found if isinstance(found, tuple) else (found,)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Bit by bit: NaN are equal to themselves, 0 and -0 differ."""
    got, want = got.contiguous(), want.contiguous()
    return got.shape == want.shape and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def ways(count, device):
    """Row numbers, and how their tensors lie."""
    every = torch.arange(count, device=device)
    for row in (0, count // 2, count - 1):
        yield every[row : row + 1], lambda tensor: tensor
        yield every[row : row + 1], shifted
    yield every[1 : count - 2], shifted
    yield every.flip(0), lambda tensor: tensor
    yield torch.cat([every[-3:], every, every[:7]]), lambda tensor: tensor


@pytest.mark.parametrize("name", [name for name in CALLS if name not in WITHOUT_ROWS])
def test_rows(backend, device, name):
    check_rows(CALLS[name], ROWS[backend], device)


def check_rows(call, count, device):
    tensors = on(device, call.example(count))
    written = "data" in tensors and results(call, tensors)[-1].shape == tensors["data"].shape
    with mk.batch_invariant():
        whole = results(call, tensors)
        for rows, move in ways(count, device):
            if written and len(rows) > count:
                continue  # a slot is written once
            part = results(call, chosen(call, tensors, rows, move))
            for got, want in zip(part[: len(part) - written], whole):
                assert same(got, want.index_select(0, rows)), f"rows {rows.tolist()}"
            if written:
                changed = part[-1].view(torch.uint8) != tensors["data"].view(torch.uint8)
                wanted = whole[-1].view(torch.uint8)
                assert changed.any() or rows.tolist() == [0]  # the slot of row 0 is -1
                assert torch.equal(part[-1].view(torch.uint8)[changed], wanted[changed]), f"rows {rows.tolist()}"


def _wide(dtype):
    """Calls as wide as small models', with widths that end within a vector, so that vendors' products choose."""
    hidden, inner = 576, 200
    experts = {"gate_up": torch.randn(5, 2 * inner, hidden) * hidden**-0.5, "down": torch.randn(5, hidden, inner) / 15}
    experts = {name: tensor.to(dtype) for name, tensor in experts.items()}

    def layer(n):
        ids = torch.rand(n, 5).argsort(1)[:, :2].int().contiguous()
        return {"hidden": torch.randn(n, hidden).to(dtype), **experts, "weights": torch.rand(n, 2), "ids": ids}

    def heads(n):
        return {"out": torch.randn(n, 16, 512).to(dtype), "w_uv": torch.randn(16, 131, 512).to(dtype)}

    def states(n):
        return {"outs": torch.randn(3, n, 16, 131).to(dtype), "lses": torch.randn(3, n, 16)}

    def queries(n):
        tables = {"cos": torch.rand(64, 32), "sin": torch.rand(64, 32), "positions": torch.randint(64, (n,))}
        return {"q": torch.randn(n, 16, 192).to(dtype), "w_uk": torch.randn(16, 128, 512).to(dtype), **tables}

    tokens = {0: "tokens"}
    return {
        "fused_moe": Call(mk.fused_moe, layer, {key: tokens for key in ("hidden", "weights", "ids")}),
        "expand_output": Call(mk.expand_output, heads, {"out": tokens}),
        "merge_states": Call(mk.merge_states, states, {key: {1: "tokens"} for key in ("outs", "lses")}),
        "absorb_query": Call(
            functools.partial(mk.absorb_query, rope="interleaved"), queries, {"q": tokens, "positions": tokens}
        ),
        "route": Call(
            lambda logits: mk.route(logits, 6, scoring="softmax"),
            lambda n: {"logits": torch.randn(n, 163)},
            {"logits": tokens},
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["fused_moe", "expand_output", "merge_states", "absorb_query", "route"])
@not_on("has no vendor's products", "interpret", "npu-emulated")
def test_wide_rows(backend, device, name, dtype):
    check_rows(_wide(dtype)[name], ROWS[backend], device)


def test_sequences_of_a_prefill(backend, device):
    lengths, tokens = (5, 70, 1, 0, 33), 109
    q, k = torch.randn(tokens, 3, 48, device=device), torch.randn(tokens, 3, 32, device=device)
    v, rope = torch.randn(tokens, 3, 16, device=device), torch.randn(tokens, 16, device=device)

    def run(rows, own):
        bounds = torch.tensor([0, *own], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        sizes = {"max_seqlen_q": max(own), "max_seqlen_k": max(own), "softmax_scale": 0.2, "batch_invariant": True}
        return mk.mla_prefill(
            *(shifted(x[rows]) if rows.start else x[rows] for x in (q, k, v)), bounds, bounds,
            k_rope=rope[rows].contiguous(), **sizes,
        )  # fmt: skip

    whole = run(slice(0, tokens), lengths)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        if length:
            for got, want in zip(run(rows, (length,)), whole):
                assert same(got, want[rows])
        first += length
    for got, want in zip(run(slice(5, 76), (70, 1)), whole):
        assert same(got, want[5:76])


@pytest.mark.parametrize("options", [{}, {"window": 100, "sink": True}, {"dtype": torch.bfloat16, "window": 600}])
@pytest.mark.parametrize("layout", [None, "fp8_v32", "int8"])
def test_a_query_alone_and_among_speculative_ones(backend, device, layout, options):
    """mla_decode, in tables of any width."""
    if layout:
        options = {**options, "layout": layout, "dtype": torch.bfloat16, "latent_dim": 128}
    problem = make([1300, 700, 3, 130], heads=5, queries=4, device=device, batch_invariant=True, **options)
    together = problem.run()
    longer = torch.full((4, 40), -1, dtype=torch.int32, device=device)
    longer[:, : problem.block_table.shape[1]] = problem.block_table
    for query in range(4):
        lengths = problem.seq_lens - (3 - query)
        alone = {"q": problem.q[:, query : query + 1].contiguous(), "seq_lens": lengths.clamp_min(0)}
        for table in (problem.block_table, longer):
            for got, want in zip(problem.run(**alone, block_table=table), together):
                assert same(got[:, 0], want[:, query])


@pytest.mark.parametrize("extra", [0, 40])
@pytest.mark.parametrize("layout", [None, "fp8_v32"])
def test_sparse_queries_alone_and_beside_absent_picks(backend, device, layout, extra):
    options = {"layout": layout, "latent_dim": 128, "dtype": torch.bfloat16} if layout else {}
    problem = make_decode(
        300, sequences=3, queries=3, heads=5, slots=900, extra_top_k=extra, sink=True, device=device, **options
    )
    problem.batch_invariant = True
    together = problem.run()
    wide = torch.full((3, 3, 700), -1, dtype=torch.int32, device=device)
    wide[..., :300] = problem.indices
    for picks in (problem.indices, wide):
        for query in range(3):
            one = {"q": problem.q[:, query : query + 1].contiguous()}
            one["indices"] = picks[:, query : query + 1].contiguous()
            if extra:
                one["extra_indices"] = problem.extra_indices[:, query : query + 1].contiguous()
            for got, want in zip(problem.run(**one), together):
                assert same(got[:, 0], want[:, query])


@pytest.mark.parametrize("name", ["paged_indexer_logits of bf16", "select_slots of fp8"])
def test_index_queries_alone_and_among_speculative_ones(backend, device, name):
    call = CALLS[name]
    tensors = on(device, call.example(3))
    with mk.batch_invariant():
        (together,) = results(call, tensors)
        for query in (0, 1):
            own = {key: tensors[key][:, query : query + 1].contiguous() for key in ("q", "weights")}
            lengths = (tensors["seq_lens"] - (1 - query)).clamp_min(0)
            (alone,) = results(call, tensors | own | {"seq_lens": lengths})
            assert same(alone[:, 0], together[:, query])


def test_index_queries_with_limits_alone_and_among_others(backend, device):
    call = CALLS["select_slots with limits"]
    tensors = on(device, call.example(3))
    with mk.batch_invariant():
        (together,) = results(call, tensors)
        for query in (0, 1):
            own = {key: tensors[key][:, query : query + 1].contiguous() for key in ("q", "weights", "limits")}
            (alone,) = results(call, tensors | own)
            assert same(alone[:, 0], together[:, query])


@pytest.mark.parametrize("op", ["route", "hash_route"])
def test_gradients_of_routers(backend, device, op):
    call = CALLS[op]
    tensors = on(device, call.example(9))
    toward = torch.randn(9, 4 if op == "route" else 3, device=device)

    def gradient(rows):
        own = chosen(call, tensors, rows)
        own["logits"] = own["logits"].detach().requires_grad_()
        with mk.batch_invariant():
            weights = call.run(**own)[0]
        (weights * toward[rows][:, : weights.shape[1]]).sum().backward()
        return own["logits"].grad

    every = torch.arange(9, device=device)
    whole = gradient(every)
    for row in range(9):
        assert same(gradient(every[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_pass_with_gradients(backend, device, recompute):
    call = CALLS["fused_moe"]
    tensors = on(device, call.example(9))

    def run(rows):
        own = chosen(call, tensors, rows)
        own["hidden"] = own["hidden"].detach().requires_grad_()
        return mk.fused_moe(**own, recompute=recompute, batch_invariant=True).detach()

    every = torch.arange(9, device=device)
    whole = run(every)
    for rows in (every[:1], every[4:5], every[2:8]):
        assert same(run(rows), whole[rows])


class _Flags(TorchDispatchMode):
    """What ops with this argument were given."""

    def __init__(self):
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mla_kernels":
            names = [argument.name for argument in func._schema.arguments]
            if "batch_invariant" in names:
                place = names.index("batch_invariant")
                self.seen.append(place < len(args) and args[place])
        return func(*args, **(kwargs or {}))


def flags(run, tensors) -> set[bool]:
    with _Flags() as found:
        run(**tensors)
    return set(found.seen)


@pytest.mark.parametrize("name", CALLS)
def test_block_and_keyword_reach_every_op(name, cpu_code, monkeypatch):
    call = CALLS[name]
    tensors = call.example(3)
    plain = flags(call.run, tensors)
    assert plain <= {False}
    with mk.batch_invariant():
        assert flags(call.run, tensors) == {not flag for flag in plain}
        with mk.batch_invariant(False):
            assert flags(call.run, tensors) == plain
    run = getattr(call.run, "__name__", None)
    for function in functions() - WITHOUT_KEYWORD:
        monkeypatch.setattr(mk, function, functools.partial(getattr(mk, function), batch_invariant=True))
    assert flags(getattr(mk, run, call.run), tensors) == {not flag for flag in plain}


def test_the_keyword_outranks_the_block(cpu_code):
    tensors = CALLS["expand_output"].example(3)
    with _Flags() as found:
        mk.expand_output(*tensors.values(), batch_invariant=True)
        with mk.batch_invariant():
            mk.expand_output(*tensors.values(), batch_invariant=False)
    assert found.seen == [True, False]
    for bad in (1, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match=r"batch_invariant: got .*, None or a bool is accepted"):
            mk.expand_output(*tensors.values(), batch_invariant=bad)
    with pytest.raises(TypeError, match="enabled: got int, a bool is accepted"):
        mk.batch_invariant(1)


def test_a_block_is_of_its_thread(cpu_code):
    tensors = CALLS["expand_output"].example(3)
    seen = []

    def elsewhere():
        with _Flags() as found:
            mk.expand_output(*tensors.values())
        seen.extend(found.seen)

    with mk.batch_invariant():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [False]


def test_a_block_may_be_entered_again_and_ends_with_an_error(cpu_code):
    tensors, block = CALLS["expand_output"].example(3), mk.batch_invariant()
    with pytest.raises(RuntimeError, match="stop"), block, block:
        assert flags(mk.expand_output, tensors) == {True}
        raise RuntimeError("stop")
    assert flags(mk.expand_output, tensors) == {False}


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_code_follows_the_block(cpu_code, inside):
    seen = []

    def backend(graph, example):
        seen.append({node.args[-1] for node in graph.graph.nodes if "expand_output" in str(node.target)})
        return graph.forward

    def step(x, w_uv):
        if inside:
            with mk.batch_invariant():
                return mk.expand_output(x, w_uv)
        return mk.expand_output(x, w_uv)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    x, w_uv = CALLS["expand_output"].example(3).values()
    compiled(x, w_uv)
    with mk.batch_invariant():
        compiled(x, w_uv)
    compiled(x, w_uv)
    assert set.union(*seen) == {True} if inside else seen == [{False}, {True}]


def test_an_exported_program_keeps_its_mode(cpu_code):
    class Step(torch.nn.Module):
        def forward(self, x, w_uv):
            return mk.expand_output(x, w_uv)

    tensors = tuple(CALLS["expand_output"].example(3).values())
    with mk.batch_invariant():
        exported = torch.export.export(Step(), tensors)
    with _Flags() as found:
        exported.module()(*tensors)
    assert found.seen == [True]


@not_on("has no workspace", "cpu")
def test_a_workspace_that_ends_changes_no_bits(backend, device, monkeypatch):
    problem = make([1300, 70, 600], heads=5, device=device, batch_invariant=True)
    picks = make_decode(300, sequences=3, heads=5, slots=900, device=device)
    whole, picked = problem.run(), picks.run(batch_invariant=True)
    monkeypatch.setattr(decode, "sequences_at_once", lambda split_bytes, splits: 2)
    monkeypatch.setattr(sparse, "sequences_at_once", lambda split_bytes, splits: 1)
    for got, want in zip((*problem.run(), *picks.run(batch_invariant=True)), (*whole, *picked)):
        assert same(got, want)


def test_other_libraries_names_and_modules_follow_the_block(cpu_code):
    from mla_kernels.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata
    from mla_kernels.nn import MoE, MoEConfig

    metadata, splits = get_mla_metadata()
    cache = torch.randn(4, 64, 1, 576).bfloat16()
    table, lengths = torch.arange(4, dtype=torch.int32).view(2, 2), torch.tensor([100, 7], dtype=torch.int32)
    layer = MoE(MoEConfig(32, 16, 16, num_experts=4, top_k=2, num_groups=1, top_k_groups=1))
    with torch.no_grad(), mk.batch_invariant(), _Flags() as found:
        flash_mla_with_kvcache(
            torch.randn(2, 1, 16, 576).bfloat16(), cache, table, lengths, 512, metadata, splits, causal=True
        )
        layer(torch.randn(3, 32))
    assert set(found.seen) == {True}
