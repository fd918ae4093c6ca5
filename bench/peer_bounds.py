"""Attention and the indexer's scores beside vLLM's and SGLang's Triton kernels, compiled for a chip: modelled, not run.

``python -m bench.peer_bounds --vllm FOLDER --sglang FOLDER --target sm_80 sm_120`` reads the engines' sources in these
folders (their installed packages), compiles their kernels with the blocks and warps that they launch them with for
DeepSeek-V3.2 (128 heads of 512 + 64 values; 64 index heads of 128 in pages of 64), and this library's with their rules'
tiles. SGLang's sparse prefill has all heads of a token in one program, and 128 fit none of these chips: it is compared
at 16, the share of one of eight devices, with the first of its tiles that fits the shared memory, as it is launched.

Printed are clocks of the main loop's busiest unit and without overlap (:mod:`mla_kernels.targets.bounds`) for each head
and key, or each key, and the bytes that all programs of a token load for one key. All these loops run over keys.
"""

import argparse
from pathlib import Path

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels.launch import KERNELS
from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

HEADS, TOKEN = 128, 2 * (512 + 64)
TOLD = ("BLOCK_H", "BLOCK_N", "BLOCK_KV", "num_warps", "num_stages")


def _signature(kinds: dict[str, str]) -> dict[str, str]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


SPARSE = {
    "engine": "vllm",
    "beside": ("sparse_mla_kernel", "v32_prefill"),
    "file": "v1/attention/ops/xpu_mla_sparse.py",
    "function": "_bf16_mla_sparse_kernel",
    "signature": _signature({
        "*bf16": "q_buffer k_buffer v_buffer out_ptr",
        "*fp32": "softmax_lse_ptr max_logits_ptr",
        "*i32": "indices_ptr",
        "i32": "seq_q",
        "fp32": "sm_scale",
        "i32:16": "seq_kv h_q dim_qk dim_v stride_q_token stride_q_head stride_k_token stride_k_head stride_v_token "
        "stride_v_head stride_out_token stride_out_head stride_lse stride_indices_token stride_indices_head",
    }),
    "constexprs": {
        "kv_group_num": HEADS, "index_topk": 2048, "BLOCK_H": 16, "BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_DV": 512,
        "BLOCK_DMODEL": 512, "BLOCK_DPE": 64, "LOGE2": 0.6931471805599453,
    },
    "options": {"num_warps": 4, "num_stages": 3},
    "loaded": HEADS // 16 * (TOKEN + 1024),  # keys, then values anew
}  # fmt: skip
LOGITS = {
    "engine": "vllm",
    "beside": ("indexer_stream_kernel", "v32_decode_codes"),
    "file": "v1/attention/ops/rocm_aiter_mla_sparse.py",
    "function": "_fp8_paged_mqa_logits_decode_kernel",
    "signature": _signature({
        "*fp8e4nv": "q_ptr kv_val_ptr",
        "*fp32": "kv_scale_ptr weights_ptr logits_ptr",
        "*i32": "ctx_lens_ptr block_tables_ptr",
        "i32:16": "stride_q_b stride_q_n stride_q_h stride_w_row stride_kvblk_fp8 stride_kvblk_f32 scale_region_off "
        "stride_bt_b stride_logits_row max_blocks max_model_len",
    }),
    "constexprs": {
        "NUM_HEADS": 64, "HEAD_SIZE": 128, "BLOCK_SIZE": 64, "BLOCK_KV": 64, "N_SPLITS": 64, "NEXT_N": 1,
        "CTX_PER_ROW": True,
    },
    "options": {"num_warps": 4, "num_stages": 2},
}  # fmt: skip


SGLANG_SPARSE = {
    "engine": "sglang",
    "beside": ("sparse_mla_kernel", "v32_tp8"),
    "heads": 16,
    "file": "kernels/ops/attention/dsa/triton_sparse_mla_prefill.py",
    "function": "_sparse_mla_prefill_kernel",
    "signature": _signature({
        "*bf16": "q_ptr kv_ptr o_ptr", "*i32": "idx_ptr len_ptr", "fp32": "sm_scale", "i32:16": "topk",
    }),
    "constexprs": {"H": 16, "BLOCK_H": 16, "D_QK": 576, "D_V": 512, "BLOCK_N": 64, "IDX64": False},
    "options": {"num_warps": 8, "num_stages": 3},
    "pinned": {"sm_120": {"num_warps": 4, "num_stages": 2}, "sm_121": {"num_warps": 4, "num_stages": 2}},
    "loaded": TOKEN,
}  # fmt: skip
SGLANG_DECODE = {
    "engine": "sglang",
    "beside": ("mla_decode_kernel", "v3"),
    "file": "kernels/ops/attention/decode_attention.py",
    "function": "_fwd_grouped_kernel_stage1",
    "signature": _signature({
        "*bf16": "Q K_Buffer V_Buffer",
        "*fp32": "Att_Out Att_Lse",
        "*i32": "kv_indptr num_kv_splits",
        "*i64": "kv_indices",
        "fp32": "sm_scale_withk",
        "i32:16": "stride_qbs stride_qh stride_buf_kbs stride_buf_kh stride_buf_vbs stride_buf_vh stride_mid_ob "
        "stride_mid_oh stride_mid_os",
        "i32": "stride_buf_kpage stride_buf_ktok stride_buf_vpage stride_buf_vtok aux0_stride_t aux0_stride_h aux0_len "
        "forced_kv_splits",
    }),
    "constexprs": {
        "kv_group_num": HEADS, "q_head_num": HEADS, "BLOCK_DMODEL": 512, "BLOCK_DPE": 64, "BLOCK_DV": 512,
        "BLOCK_N": 32, "BLOCK_H": 16, "MIN_BLOCK_KV": 32, "logit_cap": 0.0, "xai_temperature_len": -1,
        "Lk": 576, "Lv": 512,
        "HAS_MLA": True, "USE_PDL": False, "IS_GFX1250": False, "PAGE_SIZE": 1, "SCORE_MOD": None, "Aux0": None,
        "USE_FORCED": False, "uneven_batch": None, "ROTATE_BATCH": False,
    },
    "options": {"num_warps": 4, "num_stages": 2},
    "loaded": HEADS // 16 * TOKEN,
}  # fmt: skip
PEERS = (SPARSE, LOGITS, SGLANG_SPARSE, SGLANG_DECODE)


def kernel_text(source: str, function: str) -> str:
    """A module with one kernel of ``source``: from its decorator to the next two empty lines."""
    start = source.rindex("@triton.jit", 0, source.index(f"def {function}("))
    return f"import triton\nimport triton.language as tl\n\n\n{source[start:].split(chr(10) * 3)[0]}\n"


def smaller_tiles(block: int, stages: int) -> list[dict]:
    """The (BLOCK_N, stages) that SGLang's prefill tries one after the other, as options and blocks."""
    tries = (block, stages), (block, 2), (block // 2, stages), (block // 2, 2), (block // 4, 2), (16, 2)
    return [dict(zip(("BLOCK_N", "num_stages"), one)) for one in dict.fromkeys(tries)]


def of_peer(peer: dict, folder: Path, chip) -> tuple[dict, dict]:
    """(blocks, what the compiler says of an engine's kernel): the first that fits the chip's shared memory."""
    text = kernel_text((folder / peer["file"]).read_text(), peer["function"])
    options = peer["options"] | peer.get("pinned", {}).get(chip.name, {})
    tries = [{}] if peer is not SGLANG_SPARSE else smaller_tiles(peer["constexprs"]["BLOCK_N"], options["num_stages"])
    for one in tries:
        blocks = peer["constexprs"] | {name: size for name, size in one.items() if name == "BLOCK_N"}
        launched = options | {name: size for name, size in one.items() if name == "num_stages"}
        job = {"function": peer["function"], "signature": peer["signature"], "constexprs": blocks, "options": launched}
        job |= {"action": "report", "source": text, "language": "triton", "vendor": chip.vendor}
        answer = service.pool().submit("gpu", job | {"architecture": chip.architecture}).result()
        if not answer["ok"] or answer["memory"]["shared"] <= chip.memory["shared"]:
            return blocks | launched, answer
    return blocks | launched, {"ok": False, "reason": f"no tile fits {chip.memory['shared']:,} bytes of shared memory"}


def of_ours(kernel: str, case: str, dtype: str, chip) -> tuple[dict, dict]:
    """(tile, loop bounds) of a declared case."""
    kernel = KERNELS[kernel]
    case = next(one for one in kernel.cases if one.name == case)
    tile = kernel.rule(chip, dtype, case.statics, case.sizes)
    (report,) = compile_many([Request(kernel, chip, dtype, case.statics, tile, case.name)])
    return tile, report.detail["loop_bounds"] | {"spills": report.spills, "loop_spills": report.loop_spills}


def line(label: str, bounds: dict, work: int, loaded: float) -> str:
    return (
        f"{label}: busiest unit {bounds['core'] / work:.2f}, without overlap {bounds['serial'] / work:.2f} clocks; "
        f"{bounds['spills']} spills, {bounds['loop_spills']} in the loop; {loaded:,.0f} bytes"
    )


def show(peer: dict, folder: Path, target: str) -> None:
    chip, logits = CHIPS[target], peer is LOGITS
    label = f"{target} {peer['engine']} {peer['function']}"
    blocks, answer = of_peer(peer, folder, chip)
    if answer["ok"]:
        work = blocks["BLOCK_KV"] if logits else blocks["BLOCK_H"] * blocks["BLOCK_N"]
        told = {name: blocks[name] for name in TOLD if name in blocks}
        print(line(f"{label} {told}", answer["detail"]["loop_bounds"] | answer, work, peer.get("loaded", 132)))
    else:
        print(f"{label}: {answer['reason']}")
    (kernel, case), dtype = peer["beside"], "bf16"
    if logits and not chip.dot_e4m3:
        case, dtype = "v32_decode_fp8", "fp16"  # as queries in codes are multiplied
    tile, bounds = of_ours(kernel, case, dtype, chip)
    work = tile["BLOCK_N"] if logits else tile["BLOCK_H"] * tile["BLOCK_N"]
    loaded = 132 if logits else peer.get("heads", HEADS) / tile["BLOCK_H"] * TOKEN
    print(line(f"{target} {kernel} {case} {tile}", bounds, work, loaded))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peer_bounds", description=__doc__.splitlines()[0])
    for engine in ("vllm", "sglang"):
        parser.add_argument(f"--{engine}", type=Path, metavar="FOLDER", help=f"{engine}'s package")
    known = [name for name, chip in CHIPS.items() if chip.vendor == "nvidia" and not chip.tensor_memory]
    parser.add_argument("--target", nargs="+", choices=known, default=["sm_80", "sm_120"])
    options = parser.parse_args(arguments)
    peers = [(peer, getattr(options, peer["engine"])) for peer in PEERS if getattr(options, peer["engine"])]
    if not peers:
        parser.error("--vllm or --sglang: neither is given, one folder or both are needed")
    for target in options.target:
        for peer, folder in peers:
            show(peer, folder, target)


if __name__ == "__main__":
    main()
