"""Makes tests/compat/torch_npu_schemas.txt: the schemas of the functions that compat.torch_npu has, from the package.

    pip download --no-deps torch_npu==2.14.0
    python -m tests.compat.torch_npu_schemas torch_npu-2.14.0-*.whl

The wheel is read as an archive: importing it would need CANN.
"""

import sys
import zipfile
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
YAML = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
NAMES = (
    "npu_fused_infer_attention_score",
    "npu_grouped_matmul",
    "npu_grouped_matmul.List",
    "npu_kv_rmsnorm_rope_cache",
    "npu_kv_rmsnorm_rope_cache_v2",
    "npu_lightning_indexer",
    "npu_mla_prolog_v3",
    "npu_moe_distribute_combine",
    "npu_moe_distribute_dispatch",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_init_routing_v2",
    "npu_sparse_flash_attention",
)


def schemas(wheel: str) -> list[str]:
    """The package's name and version, then a schema a line."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = dict(line.split(": ", 1) for line in archive.read(metadata).decode().splitlines() if ": " in line)
        for line in archive.read(YAML).decode().splitlines():
            schema = line.split("func: ", 1)[1] if "func: " in line else ""
            found.setdefault(schema.split("(")[0], schema)
    return [f"{fields['Name']} {fields['Version']}", *(found[name] for name in NAMES)]


def read() -> tuple[str, list[str]]:
    version, *lines = FILE.read_text().splitlines()
    return version, lines


if __name__ == "__main__":
    FILE.write_text("\n".join(schemas(sys.argv[1])) + "\n")
