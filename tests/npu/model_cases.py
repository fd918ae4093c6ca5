"""Whole models of transformers on an emulated ``npu`` device, run by tests/npu/test_npu_dispatch.py in a process of its
own: the tokens of the CPU path, and every op of the library by its kernels in the emulator."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mla_kernels import demo, tiles
from mla_kernels.compat.transformers import enable
from mla_kernels.targets import emulated_npu
from tests.compat import models, test_transformers_v4
from tests.test_docs import NPU_PAGE, TEXTS, code

pytestmark = pytest.mark.device_process

NEW, HYPER = 6, ("project", "finish")
MOE = {("fused_moe", f"moe_{name}_kernel") for name in ("dispatch", "gate_up", "down", "combine")}
INDEXER = {("select_slots", f"{name}_kernel") for name in ("indexer_logits", "topk", "slots")}
LITE = MOE | {("mla_prefill", "mla_prefill_kernel"), ("mla_decode", "mla_decode_kernel")}
V32 = MOE | INDEXER | {(op, "sparse_mla_kernel") for op in ("sparse_mla_prefill", "sparse_mla_decode")}
V4 = (
    MOE
    | INDEXER
    | {("select_keys", "indexer_logits_kernel"), ("select_keys", "topk_kernel")}
    | {(op, "sparse_mla_kernel") for op in ("sparse_mla_prefill", "sparse_mla_decode")}
    | {(op, "paged_slots_kernel") for op in ("window_slots", "entry_slots")}
    | {(op, f"hyper_{name}_kernel") for op in ("hyper_pre", "hyper_post_pre", "hyper_head") for name in HYPER}
    | {
        ("hyper_post", "hyper_project_kernel"),
        ("sparse_mla_decode", "sparse_mla_pair_kernel"),
        ("rotate_heads", "rotate_heads_kernel"),
        ("compress_windows", "compress_windows_kernel"),
        ("write_windows", "write_windows_kernel"),
        ("write_kv_with_latent", "write_kv_kernel"),
    }
)


def lite():
    """DeepSeek-V2-Lite's widths in two layers, one of them of experts, of which it has 8."""
    sizes = dict(num_hidden_layers=2, intermediate_size=2816, n_routed_experts=8)
    return demo.build_model(demo.V2_LITE | sizes, torch.float32, seed=0)


MODELS = {
    "V2-Lite's widths": (lite, 20, LITE),
    "V3.2": (lambda: models.tiny("DeepseekV32"), models.INDEXER["index_topk"] + 21, V32),
    "V4": (test_transformers_v4.tiny, 61, V4),
}
"""A small model, the tokens of its prompt, and what the emulator is to execute: (op, kernel)."""


class Calls(TorchDispatchMode):
    """The library's ops that are called within the block, and the devices of their tensors."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mla_kernels":
            tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
            self.seen |= {(function._opname, tensor.device.type) for tensor in tensors}
        return function(*args, **(kwargs or {}))


def generate(model, ids):
    with torch.no_grad(), tiles.silent():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow(when=lambda name, dtype: dtype != torch.float32)
@pytest.mark.leave_out("the test below", when=lambda name, dtype: (name, dtype) == ("V4", torch.bfloat16))
def test_same_tokens_as_on_the_cpu(name, dtype):
    make, length, expected = MODELS[name]
    model = enable(make().to(dtype))
    ids = torch.randint(2, model.config.vocab_size - 2, (1, length))
    on_cpu = generate(model, ids)
    assert len(set(on_cpu)) > 3, "the greedy text must not be constant"
    model.to("npu")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"npu"}
    with emulated_npu.record() as executed, Calls() as calls:
        on_npu = generate(model, ids.to("npu"))
    assert on_npu == on_cpu
    assert set(executed) == expected, "every op by its kernels, and no other"
    assert calls.seen == {(op, "npu") for op, _ in expected}, "no op of CPU tensors"


@pytest.mark.slow
def test_v4_in_bfloat16_is_as_near_to_float32_as_on_the_cpu():
    """Where entries and experts score alike, another order of sums chooses others: the median token is compared."""
    model = enable(test_transformers_v4.tiny().to(torch.bfloat16))
    exact = enable(test_transformers_v4.tiny())
    exact.load_state_dict(
        {name: value.to(exact.state_dict()[name].dtype) for name, value in model.state_dict().items()}
    )
    ids = torch.randint(2, model.config.vocab_size - 2, (4, 61))
    with torch.no_grad(), tiles.silent():
        expected, on_cpu = exact(ids).logits, model(ids).logits.float()
        on_npu = model.to("npu")(ids.to("npu")).logits.cpu().float()
    errors = [(logits - expected).square().mean(-1).sqrt().median() for logits in (on_npu, on_cpu)]
    assert 0 < errors[0] <= 2 * errors[1]


def test_the_demo(capsys):
    assert demo.main(["--backend", "npu-emulated", "--smoke", "--tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert "Greedy text: identical (5 tokens" in printed
    assert "prefill, 64 tokens" in printed and "Compile matrix" not in printed
    for op, kernel in LITE:
        assert f"{op} " in printed and f"{kernel} " in printed


def test_the_page_s_example():
    names: dict = {}
    with tiles.silent():
        exec(compile(code(TEXTS[NPU_PAGE]), NPU_PAGE, "exec"), names)
    assert names["on_npu"].device.type == "npu" and len(names["executed"]) > 4
