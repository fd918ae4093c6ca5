"""Sparse attention and the indexer's scores beside vLLM's Triton kernels, compiled for one chip: modelled, never run.

``python -m bench.peer_bounds --vllm FOLDER --target sm_80 sm_120`` reads vLLM's sources in FOLDER (its installed
package), compiles its kernels with the blocks and warps that vLLM launches them with for DeepSeek-V3.2 (128 heads of
512 + 64 values; 64 index heads of 128 in pages of 64), and this library's with their rules' tiles. It prints clocks of
the main loop's busiest unit and without overlap (:mod:`mla_kernels.targets.bounds`) for each head and key, or each key,
and the bytes that all programs of a token load for one key.
"""

import argparse
from pathlib import Path

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels.launch import KERNELS
from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

OPS = Path("v1/attention/ops")
HEADS, TOKEN = 128, 2 * (512 + 64)


def _signature(kinds: dict[str, str]) -> dict[str, str]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


SPARSE = {
    "file": "xpu_mla_sparse.py",
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
}  # fmt: skip
LOGITS = {
    "file": "rocm_aiter_mla_sparse.py",
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


def kernel_text(source: str, function: str) -> str:
    """A module with one kernel of ``source``: from its decorator to the next two empty lines."""
    start = source.rindex("@triton.jit", 0, source.index(f"def {function}("))
    return f"import triton\nimport triton.language as tl\n\n\n{source[start:].split(chr(10) * 3)[0]}\n"


def of_peer(peer: dict, folder: Path, chip) -> dict:
    """What the compiler says of vLLM's kernel."""
    text = kernel_text((folder / OPS / peer["file"]).read_text(), peer["function"])
    job = {name: peer[name] for name in ("function", "signature", "constexprs", "options")}
    job |= {"action": "report", "source": text, "language": "triton", "vendor": chip.vendor}
    return service.pool().submit("gpu", job | {"architecture": chip.architecture}).result()


def of_ours(kernel: str, case: str, chip) -> tuple[dict, dict]:
    """(tile, loop bounds) of a declared case."""
    kernel = KERNELS[kernel]
    case = next(one for one in kernel.cases if one.name == case)
    tile = kernel.rule(chip, "bf16", case.statics, case.sizes)
    (report,) = compile_many([Request(kernel, chip, "bf16", case.statics, tile, case.name)])
    return tile, report.detail["loop_bounds"] | {"spills": report.spills}


def line(label: str, bounds: dict, work: int, loaded: float) -> str:
    return (
        f"{label}: busiest unit {bounds['core'] / work:.2f}, without overlap {bounds['serial'] / work:.2f} clocks; "
        f"{bounds['spills']} spills; {loaded:,.0f} bytes"
    )


def show(folder: Path, target: str) -> None:
    chip = CHIPS[target]
    for peer, kernel, case in ((SPARSE, "sparse_mla_kernel", "v32_prefill"), (LOGITS, "indexer_logits_kernel", None)):
        sparse = peer is SPARSE
        answer, blocks = of_peer(peer, folder, chip), peer["constexprs"]
        if answer["ok"]:
            work = blocks["BLOCK_H"] * blocks["BLOCK_N"] if sparse else blocks["BLOCK_KV"]
            loaded = HEADS / blocks.get("BLOCK_H", HEADS) * (TOKEN + 1024) if sparse else 132  # keys, then values anew
            bounds = answer["detail"]["loop_bounds"] | {"spills": answer["spills"]}
            print(line(f"{target} vLLM {peer['function']}", bounds, work, loaded))
        else:
            print(f"{target} vLLM {peer['function']}: {answer['reason']}")
        case = case or ("v32_decode_codes" if chip.dot_e4m3 else "v32_decode_fp8")
        tile, bounds = of_ours(kernel, case, chip)
        work = tile["BLOCK_H"] * tile["BLOCK_N"] if sparse else tile["BLOCK_N"]
        print(
            line(f"{target} {kernel} {case} {tile}", bounds, work, HEADS / tile["BLOCK_H"] * TOKEN if sparse else 132)
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peer_bounds", description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, metavar="FOLDER", help="vLLM's package")
    known = [name for name, chip in CHIPS.items() if chip.vendor == "nvidia" and not chip.tensor_memory]
    parser.add_argument("--target", nargs="+", choices=known, default=["sm_80", "sm_120"])
    options = parser.parse_args(arguments)
    for target in options.target:
        show(options.vllm, target)


if __name__ == "__main__":
    main()
