"""Corrections to Triton's interpreter, applied once before the first interpreted launch.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as raw 16-bit integers. It multiplies those integers in ``tl.dot``
(results near 1e10), and it truncates float32 to bfloat16 where every compiler rounds to nearest even. Both are put
right here. Products of bfloat16 and ``fma`` are rounded once, as chips that have them do. Other arithmetic on bfloat16,
of which the interpreter would make nonsense, is refused: kernels compute in float32. Products of matrices are summed in
float64 and rounded once: on some processors NumPy's in float32 give a row other bits beside other rows. AMD's own e4m3
(float8e4b8), which the interpreter of Triton 3.6 and 3.7 converts but has no type for, gets that.

It also does much that a launch of small tiles spends most of its time on, and that changes no result: it replaces the
language's functions anew in every call of a device function, by a search through all of their modules; it looks for
overflows of int32 with nine interpreted operations, and drops what it finds; it works out shape, name and NumPy type
of every value anew. Here the first is done once a launch, the second not at all, the third once for each type.
"""

import functools
from types import ModuleType

import numpy as np

from mla_kernels.language import INTERPRET, TRITON_VERSION, tl
from mla_kernels.versions import minor

_ARITHMETIC = (
    "binary_op", "ternary_op", "unary_op", "create_clampf", "create_erf", "create_fabs", "create_fma", "create_rsqrt",
)  # fmt: skip
"""Methods of the interpreter through which all arithmetic goes."""


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns (uint16), rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def fp64_to_bf16(values: np.ndarray) -> np.ndarray:
    """float64 to bfloat16 bit patterns (uint16), rounded once, to nearest even."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        # Rounded to odd instead of to even, float32 still says on which side of a middle a value lies.
        toward = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    odd = toward.view(np.uint32) | ((toward != values) & np.isfinite(toward)).astype(np.uint32)
    return fp32_to_bf16(odd.view(np.float32))


def check_numpy(triton_version: tuple[int, int], numpy_version: str) -> None:
    """Raise RuntimeError where Triton's interpreter cannot run beside this NumPy."""
    if triton_version < (3, 7) and minor(numpy_version) >= (2, 4):
        raise RuntimeError(
            f"numpy {numpy_version} is installed; the interpreter of Triton 3.6 needs numpy<2.4, since it takes arrays "
            "of one element for numbers. Install that, or triton>=3.7"
        )


@functools.cache
def prepare() -> None:
    """Install the corrections. Raises RuntimeError where the interpreter was not switched on before Triton's import, or
    cannot run beside the NumPy that is installed."""
    if not INTERPRET:
        raise RuntimeError(
            "interpreting a kernel needs TRITON_INTERPRET=1 in the environment before Triton is imported"
        )
    check_numpy(TRITON_VERSION, np.__version__)
    _correct_bfloat16()
    if TRITON_VERSION < (3, 9):
        _name_float8e4b8()
    _replace_language_once()
    _look_for_no_overflow()
    _remember_types()


def _correct_bfloat16() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(bf16_to_fp32(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(fp32_to_bf16(source.data), tl.bfloat16)
        if tl.bfloat16 in kinds and kinds[0] != kinds[1]:  # through float32, never as integers
            return cast_impl(self, cast_impl(self, source, tl.float32), target)
        return cast(self, source, target)

    def create_dot(self, a, b, accumulator, *precision):
        if not accumulator.dtype.scalar.is_floating():
            return dot(self, a, b, accumulator, *precision)
        a, b = (TensorHandle(bf16_to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        nothing = TensorHandle(np.zeros(accumulator.data.shape), tl.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            product = dot(self, a, b, nothing, *precision).data
            return TensorHandle(product.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)

    convert = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, source, target, rounding_mode):
        if {source.dtype.scalar, target.scalar} == {tl.bfloat16, tl.float32}:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding_mode)

    def widened(name):
        compute = getattr(InterpreterBuilder, name)

        def run(self, *operands):
            if operands[-1] is not np.where:  # chooses, computes nothing
                handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
                if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
                    if name != "create_fma" and operands[-1] is not np.multiply:
                        raise TypeError(f"{name}: got an operand in bfloat16; a kernel computes in float32")
                    x, y, *z = (bf16_to_fp32(handle.data).astype(np.float64) for handle in handles)
                    with np.errstate(over="ignore", invalid="ignore"):
                        return TensorHandle(fp64_to_bf16(x * y + z[0] if z else x * y), tl.bfloat16)
            return compute(self, *operands)

        return run

    for name in _ARITHMETIC:
        setattr(InterpreterBuilder, name, widened(name))
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _name_float8e4b8() -> None:
    from triton.runtime import interpreter

    replace = interpreter._patch_lang_core

    def replace_and_name(lang, scope):
        replace(lang, scope)
        type_of = lang.dtype.to_ir

        def to_ir(self, builder):
            return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else type_of(self, builder)

        lang.dtype.to_ir = to_ir

    interpreter._patch_lang_core = replace_and_name


def _replace_language_once() -> None:
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = functools.cache(lambda fn: frozenset({tl, tl.core} & {*filter(_is_module, fn.__globals__.values())}))
    replaced = set()  # modules of the language whose functions are replaced until the launch ends
    nothing = interpreter._LangPatchScope()

    def replace_once(fn):
        if modules(fn) in replaced:
            return nothing
        replaced.add(modules(fn))
        return replace(fn)

    def launch_anew(*args, **kwargs):
        replaced.clear()
        try:
            launch(*args, **kwargs)
        finally:
            replaced.clear()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_anew


def _look_for_no_overflow() -> None:
    """What the search finds goes into an assertion that the interpreter's options leave out."""
    from triton.language.semantic import TritonSemantic

    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None


def _remember_types() -> None:
    """Blocks, tensors and NumPy's types of types that were seen before are made of what was worked out then."""
    from triton.runtime import interpreter

    make_type, make_tensor, find = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    of_blocks: dict[tuple, dict] = {}
    of_tensors: dict[str, dict] = {}
    found: dict[str, np.dtype] = {}

    def block_type(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if any(type(extent) is not int for extent in key[1:]):
            make_type(self, element_ty, shape)
            return
        if key not in of_blocks:
            make_type(self, element_ty, shape)
            of_blocks[key] = dict(self.__dict__)
        self.__dict__.update(of_blocks[key])

    def tensor(self, handle, type):
        if type.name not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[type.name] = dict(self.__dict__, handle=None)
        self.__dict__.update(of_tensors[type.name], handle=handle, type=type)

    def numpy_type(kind):
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, numpy_type


def _is_module(value) -> bool:
    return isinstance(value, ModuleType)
