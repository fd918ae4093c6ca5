"""SGLang's Triton kernels in SGLang's order of launches; its CUDA helpers (align, silu, quantisation) are vLLM's."""

import functools
import json
import types
from pathlib import Path

import torch
import triton.language as tl

from mla_kernels.device.peers.files import NEEDS
from mla_kernels.device.peers.libraries import quantise_fp8, silu_and_mul
from mla_kernels.device.peers.modules import from_file, stand_in

CONFIGS = "sglang/srt/layers/moe/moe_runner/triton_utils/configs"
VLLM_CONFIGS = "vllm/model_executor/layers/fused_moe/configs"
FILES_TRITON = "triton_3_6_0"
"""SGLang keeps a folder of tile files for each Triton; this one is looked into first, then the newest."""
FP8_BLOCK = [128, 128]
NEAR = {  # (experts, width inside, fp8) -> (device, experts, width) whose file is nearest, where a device has none
    (256, 256, True): ("NVIDIA_H200", 256, 256),
    (256, 256, False): ("NVIDIA_H100_80GB_HBM3", 256, 512),
    (64, 1408, False): ("NVIDIA_H100_80GB_HBM3", 64, 1536),
    (32, 2048, False): ("NVIDIA_H100_80GB_HBM3", 32, 1856),
    (64, 1408, True): ("NVIDIA_H100_80GB_HBM3", 64, 1024),
}


def _tile(m: int, n: int, k: int, group: int, warps: int, stages: int) -> dict[str, int]:
    return dict(
        BLOCK_SIZE_M=m, BLOCK_SIZE_N=n, BLOCK_SIZE_K=k, GROUP_SIZE_M=group, num_warps=warps, num_stages=stages
    )  # fmt: skip


TYPICAL = {  # tiles frequent in its files: up to 16 rows an expert, up to 96, more
    False: (_tile(16, 128, 128, 1, 4, 4), _tile(64, 128, 64, 16, 4, 4), _tile(128, 256, 64, 16, 8, 4)),
    True: (_tile(16, 128, 128, 1, 4, 4), _tile(64, 128, 128, 16, 4, 4), _tile(128, 128, 128, 16, 8, 3)),
}


def default(fp8: bool, tokens: int, experts: int) -> dict[str, int]:
    """SGLang's rule where it has no file."""
    if fp8:
        return _tile(64, 128, 128, 32, 4, 3)
    if tokens <= experts:
        return dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64, GROUP_SIZE_M=1)
    return dict(BLOCK_SIZE_M=64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=32, GROUP_SIZE_M=8)


class _Nothing:
    """SGLang's environment: every switch off."""

    def __getattr__(self, name: str):
        return types.SimpleNamespace(get=lambda: False)


def _stand_ins() -> None:
    def no(*arguments, **more):
        return False

    def absent(*arguments, **more):
        raise NotImplementedError("this part of SGLang is not loaded here")

    ops = "sglang.kernels.ops.quantization"
    stand_in("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: True)
    stand_in(
        f"{ops}.fp8_kernel", per_token_group_quant_fp8=quantise_fp8, sglang_per_token_group_quant_fp8=quantise_fp8,
        scaled_fp8_quant=absent,
    )  # fmt: skip
    stand_in(
        f"{ops}.int8_kernel", per_token_group_quant_int8=absent, per_token_quant_int8=absent,
        sglang_per_token_group_quant_int8=absent,
    )  # fmt: skip
    stand_in("sglang.srt.batch_invariant_ops", is_batch_invariant_mode_enabled=no)
    stand_in("sglang.srt.layers.moe.utils", get_moe_padding_size=lambda *_: 0)
    stand_in("sglang.srt.environ", envs=_Nothing())
    stand_in(
        "sglang.srt.utils", cpu_has_amx_support=no, get_bool_env_var=no, is_cpu=no, is_cuda=lambda: True, is_hip=no,
        is_sm90_supported=lambda: True, get_device_core_count=lambda *_: 132, is_gfx95_supported=no,
        is_gfx1250_supported=no, is_xpu=no, is_musa=no,
    )  # fmt: skip


class SGLang:
    def __init__(self, root: Path, device_name: str, stub: bool):
        _stand_ins()
        self._root, self._stub, self._device = root, stub, device_name.replace(" ", "_")
        _, (score_mod, decode, moe, small) = NEEDS["SGLang"]
        from_file(root, score_mod)
        self._decode, self._moe, self._small = (from_file(root, file) for file in (decode, moe, small))

    def decode(self, q, rows, bounds, splits: int, scale: float):
        """slots -> [batch, heads, 512]: decode of q [batch, heads, 576] over rows [tokens, 1, 576]."""
        batch, heads, _ = q.shape
        parts = torch.empty(batch, heads, splits, 512, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
        out = torch.empty(batch, heads, 512, dtype=q.dtype, device=q.device)
        counts = torch.full((batch,), splits, dtype=torch.int32, device=q.device)

        def run(slots):
            self._decode.decode_attention_fwd(
                q, rows, rows[..., :512], out, bounds, slots, parts, lse, counts, splits, scale, 1.0, 1.0, has_mla=True
            )
            return out

        return run

    def tiles(self, gate_up: torch.Tensor, ids_shape, *, fp8: bool) -> list[tuple[str, dict, dict | None]]:
        """(label, tile of gate_up, tile of down or None): what its file says for this device and shape, else that of
        the nearest or its default; and typical ones. Who compares takes the fastest."""
        experts, inner = gate_up.shape[0], gate_up.shape[1] // 2
        tokens, top_k = ids_shape
        found = []
        tuned = self._file(self._device, experts, inner, fp8, down=False)
        if tuned:
            first = _nearest(tuned, tokens)
            downs = self._file(self._device, experts, inner, fp8, down=True)
            second = _nearest(downs, tokens) | {"BLOCK_SIZE_M": first["BLOCK_SIZE_M"]} if downs else None
            found.append(("its tuned tiles", first, second))
        else:
            near = NEAR.get((experts, inner, fp8))
            other = self._file(*near, fp8, down=False) if near else None
            if other:
                found.append(("tiles of the nearest file", _nearest(other, tokens), None))
            else:
                found.append(("its default", default(fp8, tokens, experts), None))
        rows = tokens * top_k / experts
        few, some, many = TYPICAL[fp8]
        found.append(("typical tiles", few if rows <= 16 else some if rows <= 96 else many, None))
        if rows > 96:
            found.append(("typical tiles of 64 rows", some, None))
        return found

    @functools.lru_cache(None)  # noqa: B019  one object lives as long as the process
    def _file(self, device: str, experts: int, inner: int, fp8: bool, *, down: bool) -> dict[int, dict] | None:
        """Tiles by number of tokens: SGLang's file, else vLLM's."""
        kind = f",dtype=fp8_w8a8,block_shape={FP8_BLOCK}" if fp8 else ""
        name = f"E={experts},N={inner},device_name={device}{kind}{'_down' if down else ''}.json"
        folders = sorted((self._root / CONFIGS).glob("triton_*"), key=lambda f: [*map(int, f.name.split("_")[1:])])
        folders = sorted(reversed(folders), key=lambda f: f.name != FILES_TRITON)
        for path in (*(f / name for f in folders), self._root / VLLM_CONFIGS / name.replace(", ", ",")):
            if path.is_file():
                return {int(m): tile for m, tile in json.loads(path.read_text()).items() if m.isdigit()}
        return None

    def experts(self, hidden, gate_up, down, weights, *, ids, first, second=None, scales=None):
        """All of its launches: align, the first product, SwiGLU, the second product, the sum."""
        tokens, top_k = ids.shape
        count, width, _ = gate_up.shape
        first = {name: value for name, value in first.items() if name != "USE_TMA"}
        second = {name: value for name, value in (second or first).items() if name != "USE_TMA"}
        order, blocks, total = self._align(ids, first["BLOCK_SIZE_M"], count)
        fp8 = scales is not None
        flags = dict(
            compute_type=tl.bfloat16, use_fp8_w8a8=fp8, use_int8_w8a8=False, use_int8_w8a16=False,
            use_int4_w4a16=False, per_channel_quant=False, block_shape=FP8_BLOCK if fp8 else None, filter_expert=False,
        )  # fmt: skip
        up_scale, down_scale = scales if fp8 else (None, None)

        def product(x, weight, out, scale, routed: bool, per_token: int, tile: dict):
            self._moe.invoke_fused_moe_kernel(
                x, weight, None, out, None, scale, None, weights, ids, order, blocks, total, routed, per_token, tile,
                **flags,
            )  # fmt: skip

        one = torch.empty(tokens * top_k, width, dtype=hidden.dtype, device=hidden.device)
        product(hidden, gate_up, one, up_scale, False, top_k, first)
        two = one[:, : width // 2].contiguous() if self._stub else silu_and_mul(one)
        three = torch.empty(tokens, top_k, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        product(two, down, three, down_scale, True, 1, second)
        out = torch.empty_like(hidden)
        self._moe.moe_sum_reduce_triton(three, out, 1.0)
        return out

    def _align(self, ids, block: int, experts: int):
        count = ids.numel()
        size = count * block if count < experts + 1 else count + (experts + 1) * (block - 1)
        order = torch.empty(size, dtype=torch.int32, device=ids.device)
        blocks = torch.empty(-(-size // block), dtype=torch.int32, device=ids.device)
        total = torch.empty(1, dtype=torch.int32, device=ids.device)
        if count <= self._small.SMALL_NUMEL_LIMIT and experts + 1 > 64:
            self._small.moe_align_small_numel(ids, experts + 1, block, order, blocks, total)
        elif not self._stub:
            torch.ops._moe_C.moe_align_block_size(ids, experts, block, order, blocks, total, None)
        return order, blocks, total


def _nearest(tiles: dict[int, dict], tokens: int) -> dict:
    return dict(tiles[min(tiles, key=lambda m: abs(m - tokens))])
