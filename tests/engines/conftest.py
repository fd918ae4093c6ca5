"""Tests inside vLLM itself, in an environment of their own: ``make test-engines``.

vLLM's package for CUDA is installed and there is no GPU: its platform is told which capability to name. Tensors are CPU
tensors, vLLM's Triton kernels run in the interpreter, this library's ops take their CPU code.
"""

from tests.engines.pretended import pretend

pretend(8, 0)
