"""nn modules under torch.compile without graph breaks, and under torch.export with any number of tokens."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mla_kernels import launch
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.nn import AttentionConfig, LatentAttention, MoE, MoEConfig, rope_tables

SIZES = dict(hidden_size=64, num_heads=4, q_lora_rank=48, kv_lora_rank=32, nope_dim=32, rope_dim=16, v_dim=32)
INDEXER = dict(index_top_k=8, index_heads=16, index_head_dim=32)
ATTENTIONS = {
    "dense": AttentionConfig(**SIZES),
    "no query latent": AttentionConfig(**SIZES | {"q_lora_rank": None}),
    "biases": AttentionConfig(**SIZES, bias=True),
    "v3.2": AttentionConfig(**SIZES, **INDEXER),
}
ONE_GROUP = {"num_groups": 1, "top_k_groups": 1}
MOES = {
    "v3": (MoEConfig(64, 32, 32, 16, 4, num_groups=4, top_k_groups=2), {}),
    "v2": (MoEConfig(64, 32, 64, 8, 2, scoring="softmax", **ONE_GROUP), {}),
    "v4": (MoEConfig(64, 32, 32, 8, 2, scoring="sqrt_softplus", activation=Activation("pre", 0.7), **ONE_GROUP), {}),
    "v4 hash": (MoEConfig(64, 32, 32, 8, 2, scoring="sqrt_softplus", hash_vocabulary=50, **ONE_GROUP), {}),
    "fp8_block": (MoEConfig(256, 128, 128, 8, 2, **ONE_GROUP), {"expert_format": "fp8_block"}),
    "int4 and plain": (
        MoEConfig(256, 128, 128, 8, 2, **ONE_GROUP), {"expert_format": "int4", "shared_format": "plain"}
    ),
    "mxfp4 and fp8_block": (
        MoEConfig(256, 128, 128, 8, 2, **ONE_GROUP), {"expert_format": "mxfp4", "shared_format": "fp8_block"}
    ),
}  # fmt: skip
SOME_MOES = [pytest.param(name, marks=() if name in ("v3", "v4 hash", "int4 and plain") else pytest.mark.slow)
             for name in MOES]  # fmt: skip
BATCH, PAGE, PAGES = 2, 8, 4
TABLES = rope_tables(16, 64, {"rope_theta": 1e4})


@pytest.fixture(autouse=True)
def _torch_code():
    torch._dynamo.reset()
    with launch.on_cpu("torch"), torch.no_grad():
        yield


def moe_of(name):
    config, options = MOES[name]
    moe = MoE(config, **options).requires_grad_(False).eval()
    for experts in [moe.experts, moe.shared_experts] if moe.shared_apart else [moe.experts]:
        for key, value in experts.named_buffers():
            if key.endswith("scale"):
                value.copy_(torch.rand(value.shape) * 0.01) if value.is_floating_point() else value.fill_(120)
            else:
                value.random_(0, 120)
    if config.hash_vocabulary:
        moe.gate.tid2eid.random_(0, config.num_experts)
    return moe


def moe_inputs(moe, tokens):
    ids = (torch.randint(50, (tokens,)),) if moe.config.hash_vocabulary else ()
    return torch.randn(tokens, moe.config.hidden_size), *ids


class Batch:
    """An attention layer and a batch of 18 tokens a sequence, of which 16 are prefilled."""

    def __init__(self, name, dtype=torch.float32):
        self.config = ATTENTIONS[name]
        self.layer = LatentAttention(self.config).requires_grad_(False).eval().to(dtype)
        self.hidden = torch.randn(BATCH, 18, 64, dtype=dtype)
        self.positions = torch.arange(18)[None].expand(BATCH, 18).contiguous()
        self.block_table = torch.arange(BATCH * PAGES).view(BATCH, PAGES).int()
        self.slots = self.block_table.gather(1, self.positions // PAGE) * PAGE + self.positions % PAGE
        self.cache = LatentCache.allocate(BATCH * PAGES, PAGE, latent_dim=32, rope_dim=16, dtype=dtype)
        self.indexer = {}
        if self.config.index_top_k:
            keys = IndexerCache.allocate(BATCH * PAGES, PAGE, head_dim=32, dtype=dtype)
            self.indexer = {"indexer_cache": keys}

    def arguments(self, part):
        return self.hidden[:, part], *TABLES, self.positions[:, part], self.slots[:, part], self.cache

    def calls(self):
        """Every public way through the layer: (method, arguments)."""
        whole, context = slice(0, 9), torch.full((BATCH,), 9, dtype=torch.int32)
        yield self.layer.forward, (self.hidden, *TABLES, self.positions), {}
        yield self.layer.prefill, self.arguments(whole), self.indexer
        yield self.layer.prefill, (*self.arguments(slice(9, 16)), self.block_table, context), self.indexer
        lengths = torch.full((BATCH,), 18, dtype=torch.int32)
        yield self.layer.decode, (*self.arguments(slice(16, 18)), self.block_table, lengths), self.indexer


class FakesHold(TorchDispatchMode):
    """Refuses results of this library's ops that are not what their fakes promise a compiler: strides, too."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "mla_kernels":
            self.ops.add(func.name().partition("::")[2])
            with FakeTensorMode() as mode:
                promised = func(*tree_map_only(torch.Tensor, mode.from_tensor, args), **kwargs)
            for got, want in zip(tree_leaves(result), tree_leaves(promised)):
                if isinstance(got, torch.Tensor):
                    layout = [
                        (x.dtype, x.shape, [s for s, n in zip(x.stride(), x.shape) if n > 1]) for x in (got, want)
                    ]
                    assert layout[0] == layout[1], func.name()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_lie_as_compilers_are_told(dtype):
    """bfloat16, above all, in which some products of a few tokens are computed transposed on a CPU."""
    mode = FakesHold()
    for name in ATTENTIONS:
        for method, arguments, options in Batch(name, dtype).calls():
            with mode:
                method(*arguments, **options)
    for name in MOES:
        moe = moe_of(name)
        hidden, *ids = moe_inputs(moe, 5)
        with mode:
            moe.to(dtype)(hidden.to(dtype), *ids)
    assert {"mla_prolog", "mla_decode", "expand_output", "select_slots", "fused_moe", "fused_experts"} <= mode.ops


@pytest.mark.parametrize("name", SOME_MOES)
def test_moe_compiles_without_breaks(name):
    moe = moe_of(name)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in (7, 9):  # the second makes the number of tokens dynamic
        inputs = moe_inputs(moe, tokens)
        assert torch.equal(compiled(*inputs), moe(*inputs))
        assert moe(*inputs).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*inputs), moe(*inputs))


def test_experts_in_codes_compile_after_they_were_assigned_or_moved():
    source = moe_of("fp8_block")
    with torch.device("meta"):
        assigned = MoE(source.config, expert_format="fp8_block")
    assigned.load_state_dict(source.state_dict(), assign=True)
    moved = MoE(source.config, expert_format="fp8_block").to("meta").to_empty(device="cpu")
    moved.load_state_dict(source.state_dict())
    inputs = moe_inputs(source, 5)
    for moe in (assigned, moved):
        assert torch.equal(torch.compile(moe, fullgraph=True, backend="aot_eager")(*inputs), source(*inputs))


@pytest.mark.parametrize(
    ("name", "prepared"),
    [
        ("dense", "as it is"),
        ("v3.2", "as it is"),
        pytest.param("no query latent", "as it is", marks=pytest.mark.slow),
        pytest.param("biases", "as it is", marks=pytest.mark.slow),
        pytest.param("biases", "stacked", marks=pytest.mark.slow),
        pytest.param("dense", "prepacked", marks=pytest.mark.slow),
        pytest.param("v3.2", "prepacked", marks=pytest.mark.slow),
    ],
)
def test_attention_compiles_without_breaks(name, prepared):
    batch = Batch(name)
    if prepared == "stacked":
        batch.layer.stack_projections()
    elif prepared == "prepacked":
        batch.layer.prepack()
    for method, arguments, options in batch.calls():
        compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments, **options), method(*arguments, **options), atol=1e-5, rtol=1e-5)


def test_a_model_of_both_compiles_without_breaks():
    """With gradients: attention and experts one after the other, compiled in one."""
    attention, moe = LatentAttention(ATTENTIONS["dense"]), MoE(MOES["v3"][0])

    def layer(hidden, positions):
        return moe(hidden + attention(hidden, *TABLES, positions)).square().mean()

    hidden, positions = torch.randn(2, 9, 64), torch.arange(9)[None].expand(2, 9).contiguous()
    parameters = [*attention.parameters(), *moe.parameters()]
    with torch.enable_grad():
        expected = torch.autograd.grad(layer(hidden, positions), parameters)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for got, want in zip(torch.autograd.grad(compiled(hidden, positions), parameters), expected):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", SOME_MOES)
def test_moe_is_exported_for_any_number_of_tokens(name, strict):
    moe = moe_of(name)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = moe_inputs(moe, 10)
    program = torch.export.export(moe, example, dynamic_shapes=({0: tokens},) * len(example), strict=strict)
    for number in (2, 33, 70):
        inputs = moe_inputs(moe, number)
        torch.testing.assert_close(program.module()(*inputs), moe(*inputs), atol=1e-6, rtol=1e-5)
    inputs = moe_inputs(moe, 5)
    assert moe(*inputs).isfinite().all()  # nothing of the tracing stays in the module


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["dense", "v3.2", pytest.param("no query latent", marks=pytest.mark.slow)])
def test_attention_is_exported_for_any_number_of_tokens(name, strict):
    """v3.2, too, on either side of the 8 keys that its indexer chooses."""
    layer = Batch(name).layer

    def example(tokens):
        positions = torch.arange(tokens)[None].expand(BATCH, tokens).contiguous()
        return torch.randn(BATCH, tokens, 64), *TABLES, positions

    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = ({1: tokens}, None, None, {1: tokens})
    program = torch.export.export(layer, example(10), dynamic_shapes=shapes, strict=strict)
    for number in (2, 7, 33):
        inputs = example(number)
        torch.testing.assert_close(program.module()(*inputs), layer(*inputs), atol=1e-5, rtol=1e-5)
