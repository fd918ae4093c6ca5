#!/usr/bin/env bash
# torch_npu 2.14.0 states its own operators in three places that do not agree: the schemas that calls are bound by
# (csrc/aten/npu_native_functions_by_codegen.yaml), the shapes of results for tracing (op_plugin/meta) and the docstrings
# (_op_plugin_docs.py). compat.torch_npu follows the schemas, and for results the shapes for tracing.
#
# Seen on 2026-11-29, torch_npu 2.14.0 (cp311, x86_64), read as an archive: neither CANN nor an NPU was there.
#   1. npu_sparse_flash_attention: the docstring has sparse_block_size as sixth positional argument and one result; the
#      schema has it as a keyword with default 1, and three results. A call by the docstring is refused.
#   2. npu_lightning_indexer: one result in the docstring, two in the schema.
#   3. npu_sparse_flash_attention, traced: with queries in TND the softmax's parts have key.size(1) heads, whatever
#      layout_kv says. With PA_BSND that is block_size: (128, tokens, heads // 128) in place of (1, tokens, heads).
#   4. npu_fused_infer_attention_score without softmax_lse_flag: the docstring says lse has shape [1], tracing [0].
#   5. npu_moe_init_routing_v2: the defaults are expert_tokens_num_type=0 and expert_tokens_num_flag=False; the docstring
#      says that 1 and 2, and True, alone are supported. Tracing it with a scale prints x_dtype to stdout.
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.11 \
    --platform manylinux_2_28_x86_64 --dest "$folder" torch_npu==2.14.0
cat > "$folder/texts.py" <<'PY'
import ast
import glob
import sys
import zipfile

wheel = zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/torch_npu-2.14.0-*.whl")[0])


def text(name):
    return wheel.read(f"torch_npu/{name}").decode()


def function(name):
    """Source of what is registered for tracing."""
    tree = ast.parse(META)
    return next(ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def docstring(name):
    for node in ast.parse(DOCS).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args[0].value == name:
            return node.value.args[1].value


META, DOCS = text("op_plugin/meta/_meta_registrations.py"), text("_op_plugin_docs.py")
SCHEMAS = {
    line.split("func: ")[1].split("(")[0]: line
    for line in text("csrc/aten/npu_native_functions_by_codegen.yaml").splitlines()
    if "func: " in line
}

sparse, indexer, routing = (
    SCHEMAS[name] for name in ("npu_sparse_flash_attention", "npu_lightning_indexer", "npu_moe_init_routing_v2")
)
traced = function("npu_sparse_flash_attention_forward")
found = {
    "1. sparse_block_size is positional in the docstring, a keyword in the schema": (
        "double scale_value, int sparse_block_size, *," in docstring("npu_sparse_flash_attention")
        and "*," in sparse.split("sparse_block_size=1")[0]
        and sparse.endswith("-> (Tensor, Tensor, Tensor)")
    ),
    "2. one result in the docstring of npu_lightning_indexer, two in the schema": (
        "sparse_mode=3) -> Tensor\n" in docstring("npu_lightning_indexer") and indexer.endswith("-> (Tensor, Tensor)")
    ),
    "3. traced with TND queries, heads are key.size(1), and layout_kv is not looked at": (
        "[key.size(1), query.size(0), query.size(1) // key.size(1)]" in traced and traced.count("layout_kv") == 1
    ),
    "4. lse without softmax_lse_flag: [1] in the docstring, [0] traced": (
        "softmax_lse_flag为False时, 则输出shape为[1]" in docstring("npu_fused_infer_attention_score")
        and "lse_out = torch.empty([0]" in function("npu_fused_infer_attention_score_forward")
    ),
    "5. npu_moe_init_routing_v2's defaults are documented as not supported": (
        "expert_tokens_num_type=0, bool expert_tokens_num_flag=False" in routing.replace("int ", "")
        and "当前仅支持1和2" in docstring("npu_moe_init_routing_v2")
        and "当前仅支持True" in docstring("npu_moe_init_routing_v2")
        and "print(x_dtype)" in function("npu_moe_init_routing_v2_meta")
    ),
}
for what, still in found.items():
    print(f"{'so' if still else 'no longer so'}: {what}")
sys.exit(not all(found.values()))
PY
python3 "$folder/texts.py" "$folder"
