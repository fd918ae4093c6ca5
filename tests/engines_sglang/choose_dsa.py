"""What SGLang makes of its arguments for DeepSeek-V3.2 and GLM-5: ``python -m tests.engines_sglang.choose_dsa 8.0``
prints JSON.

SGLang keeps what it found out about the chip, so that every capability needs a process of its own.
"""

import json
import logging
import os
import shlex
import sys

from tests.engines_sglang.pretended import pretend

ASKED = {
    "": "",
    "fp8": "--kv-cache-dtype fp8_e4m3",
    "by name": "--attention-backend mla_kernels",
    "fp8 by name": "--attention-backend mla_kernels --kv-cache-dtype fp8_e4m3",
    "both": "--dsa-prefill-backend mla_kernels --dsa-decode-backend mla_kernels",
    "decode": "--dsa-decode-backend mla_kernels",
    "theirs": "--dsa-prefill-backend tilelang --dsa-decode-backend tilelang",
    "contradiction": "--attention-backend mla_kernels --dsa-prefill-backend fa3 --dsa-decode-backend fa3",
}


def choose(shape, asked: str):
    from tests.engines_sglang.small_dsa import resolved

    try:
        _, view = resolved(shape, *shlex.split(asked))
    except (ValueError, SystemExit) as error:
        return f"refused: {error}"
    return view.attention_backend, view.dsa_prefill_backend, view.dsa_decode_backend, view.kv_cache_dtype


def main() -> None:
    capability = tuple(map(int, sys.argv[1].split(".")))
    logging.basicConfig(level=logging.INFO)
    if "--without" in sys.argv:
        os.environ["SGLANG_PLUGINS"] = "none"
    pretend(*capability)
    from tests.engines_sglang import small_dsa

    answers = {name: choose(small_dsa.V32, asked) for name, asked in ASKED.items()}
    answers["glm"], answers["glm by name"] = (choose(small_dsa.GLM, ASKED[name]) for name in ("", "by name"))
    answers["v3"] = choose(small_dsa.V3, ASKED["contradiction"])
    from sglang.srt.plugins.hook_registry import HookRegistry

    answers["replaced"] = sorted(target.rpartition(".")[2] for target in HookRegistry._patched)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
