"""Prints the TTIR of compile jobs: a JSON list of jobs on stdin, a JSON list of texts on stdout. Run it as a script in
a process without ``TRITON_INTERPRET``; only Triton's front end works, which takes a tenth of a compilation."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "mla_kernels" / "targets"))

import gpu_worker
import triton
from triton._C.libtriton import ir


def ttir(source, target, options):
    """In place of triton.compile: the text of the module before any pass."""
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    return source.make_ir(target, options, functions, backend.get_module_map(), context).str_nodebug()


triton.compile = ttir
print(json.dumps([gpu_worker.compile_job(job)[0] for job in json.load(sys.stdin)]))
