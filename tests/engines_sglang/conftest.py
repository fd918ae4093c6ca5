"""Tests inside SGLang itself, in an environment of their own: ``make test-engines``.

SGLang's package for CUDA is installed and there is no GPU: ``torch.cuda`` is told which capability to name. Tensors are
CPU tensors; SGLang's Triton kernels and this library's run in the interpreter.
"""

from tests.engines_sglang.pretended import pretend

pretend(8, 0)

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()
