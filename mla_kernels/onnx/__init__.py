"""Models that call this library's ops, in ONNX. Needs the packages onnx, onnxscript and, to run them, onnxruntime:
``pip install "mla_kernels[onnx]"``."""

from mla_kernels.onnx.export import OPSET, Translations, export, translations
from mla_kernels.onnx.forms import WITHOUT_FORM
from mla_kernels.onnx.functional import functional

__all__ = ["OPSET", "WITHOUT_FORM", "Translations", "export", "functional", "translations"]
