"""ExpertWeights: the weights of E experts in one format, plain or quantised, with their scales.

Symbols: E experts, H hidden size, I intermediate size; N rows (outputs) and K columns (inputs) of one weight: gate_up
has N = 2I and K = H, down has N = H and K = I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mla_kernels.checks import FLOATS, check_choice, check_int, check_tensor
from mla_kernels.cpu.packed import prepack
from mla_kernels.cpu.quantised import prepack as prepack_quantised
from mla_kernels.moe.quantised.converters import PUBLISHED, mxfp4_projection, stack_experts
from mla_kernels.moe.quantised.formats import FORMATS, WeightFormat, dequantise_weight, quantise_weight, weight_shape
from mla_kernels.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO
from mla_kernels.quant.mxfp4 import GROUP
from mla_kernels.quant.stored import read_awq, read_compressed_tensors, read_fp8, read_gptq, read_mxfp4

_TENSORS = (
    "gate_up", "down", "gate_up_scale", "down_scale", "gate_up_zero", "down_zero", "gate_up_bias", "down_bias",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of E experts, gate_up [2I, H] and down [H, I] each, for :func:`mla_kernels.fused_experts`.

    Make one with :meth:`plain`, :meth:`quantise`, or from a checkpoint's tensors with :meth:`from_fp8`,
    :meth:`from_compressed_tensors`, :meth:`from_mxfp4`, :meth:`from_mxfp4_experts`, :meth:`from_gptq`,
    :meth:`from_awq`; or pass tensors that have the format's layout already:

    ============= ============================== ====================================== ============================
    format        codes: gate_up, down           scales                                 value
    ============= ============================== ====================================== ============================
    ``plain``     bf16, fp16, fp32 [E, N, K]     none                                   the code
    ``fp8_block`` uint8 [E, N, K], e4m3          fp32 [E, ceil(N/128), ceil(K/128)]     e4m3(code) * scale
    ``int8``      int8 [E, N, K]                 fp32 [E, N]                            code * scale
    ``int8_w8a8`` int8 [E, N, K]                 fp32 [E, N]                            code * scale
    ``int4``      uint8 [E, N, 64 ceil(K/128)]   bf16, fp16, fp32 [E, N, K/group_size]  (code - zero) * scale
    ``mxfp4``     uint8 [E, N, 64 ceil(K/128)]   uint8 [E, N, K/32]                     e2m1(code) * 2^(scale - 127)
    ============= ============================== ====================================== ============================

    ``fp8_block`` and ``int8_w8a8`` quantise activations, too: to e4m3 with a power of two for each token's 128 columns,
    to int8 with one scale a token. The others multiply by activations as they are. How exact sums of e4m3 products are
    on Hopper, :func:`mla_kernels.fused_experts` says.

    Two four-bit codes share a byte: a row's columns are cut into blocks of 128, 64 bytes each; byte j of a block holds
    column j in its low nibble and column j + 64 in its high one. Where 128 does not divide K the last block is the
    row's last 128 columns, with the code of 0 for those that the block before holds. With K = 160, bytes 0 to 63 hold
    columns 0 to 127, byte 0 column 0 and (high) column 64; bytes 64 to 127 hold columns 32 to 159, byte 127 column 95
    (again, as 0) and (high) column 159. K is at least 128 and a multiple of the group.

    Attributes:
        format: a :class:`WeightFormat` or its value.
        gate_up, down: codes. A plain weight may be a transposed view ([E, K, N] in memory); all other tensors are
            contiguous. float8_e4m3fn codes are taken as bytes.
        gate_up_scale, down_scale: scales. float8_e8m0fnu is taken as bytes in mxfp4, as fp32 in fp8_block. Those of
            int4 in bf16 are below 2^122 in magnitude: what makes or converts weights refuses others, here nothing looks
            at values, and NVIDIA chips would read inf and NaN.
        gate_up_zero, down_zero: int4 only, uint8 [E, N, K / group_size], 0 to 15; None means 8 everywhere.
        gate_up_bias, down_bias: None, or [E, 2I] and [E, H] in the activations' dtype.
        group_size: columns that share a scale: 32, 64 or 128 with int4, 32 or None with mxfp4, else None.

    Raises:
        ValueError: a tensor that the format does not have or lacks, a wrong rank, shape or device, a group size that
        does not divide. TypeError: a wrong dtype, as of codes of another format. The message names the attribute.
    """

    format: WeightFormat | str
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    gate_up_zero: torch.Tensor | None = None
    down_zero: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    group_size: int | None = None
    format_name: str = field(init=False, repr=False)  # its value, as ops take it
    num_experts: int = field(init=False, repr=False)  # E
    hidden_size: int = field(init=False, repr=False)  # H
    intermediate_size: int = field(init=False, repr=False)  # I

    def __post_init__(self):
        check_choice("format", self.format, tuple(format.value for format in WeightFormat))
        object.__setattr__(self, "format", WeightFormat(self.format))
        object.__setattr__(self, "group_size", _group_size(self.format, self.group_size))
        for name in _TENSORS[:4]:
            object.__setattr__(self, name, as_stored(name, getattr(self, name), self.format))
        _check(self)
        object.__setattr__(self, "format_name", self.format.value)
        object.__setattr__(self, "num_experts", self.gate_up.shape[0])
        object.__setattr__(self, "hidden_size", self.down.shape[1])
        object.__setattr__(self, "intermediate_size", self.gate_up.shape[1] // 2)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.gate_up.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of codes, scales and zeros for each of the 3 E H I weights."""
        weights = sum(tensor.nbytes for name, tensor in self.tensors().items() if not name.endswith("bias"))
        return weights / (3 * self.num_experts * self.hidden_size * self.intermediate_size)

    @classmethod
    def plain(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """Weights as they are: gate_up [E, 2I, H], down [E, H, I], biases [E, 2I] and [E, H] or None."""
        return cls(WeightFormat.PLAIN, gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias)

    @classmethod
    def quantise(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        format: WeightFormat | str,
        *,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: torch.dtype | None = None,
        power_of_two: bool | None = None,
        search: bool | None = None,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """Round weights to a format, expert by expert, each weight to the nearest code (ties to even).

        Args:
            gate_up: [E, 2I, H] bf16, fp16 or fp32, finite. down: [E, H, I] in the same dtype.
            format: what to round to; "plain" keeps the tensors.
            group_size: int4 only, 32, 64 or 128 (the default).
            symmetric: int4 only: zero 8 everywhere (the default), else a zero for each group.
            scale_dtype: int4 only, the dtype of scales; by default the weights'.
            power_of_two: fp8_block only: scales are powers of two, as in DeepSeek-V3.1's checkpoints; by default the
                largest magnitude / 448.
            search: int4 and mxfp4 only: try several scales for each group, and keep the one with the smallest squared
                error. By default int4 takes the group's whole range and mxfp4 the scale of its standard.
            gate_up_bias, down_bias: kept as they are.

        Raises:
            ValueError: sizes the format cannot hold, an option of another format, weights that are not finite, or with
            int4 scales in bf16 of 2^122 and more. TypeError: a wrong dtype.
        """
        check_choice("format", format, tuple(known.value for known in WeightFormat))
        format = WeightFormat(format)
        options = {
            "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype, "power_of_two": power_of_two,
            "search": search,
        }  # fmt: skip
        options = {name: value for name, value in options.items() if value is not None}
        for name in options:
            if name not in FORMATS[format].options:
                raise ValueError(f"{name}: format {format.value!r} has no such option")
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        plain = cls(WeightFormat.PLAIN, gate_up, down, **biases)
        if format is WeightFormat.PLAIN:
            return plain
        if format is WeightFormat.INT4:
            options["group_size"] = _group_size(format, group_size or 128)
            options.setdefault("scale_dtype", gate_up.dtype)
            check_choice("scale_dtype", options["scale_dtype"], FLOATS)
        parts = {}
        for name, weight in (("gate_up", gate_up), ("down", down)):
            codes, scale, zero = quantise_weight(name, weight.detach(), format, options)
            parts |= {name: codes, f"{name}_scale": scale, f"{name}_zero": zero}
        return cls(format, **parts, **biases, group_size=options.get("group_size"))

    @classmethod
    def from_fp8(cls, experts: Sequence[Mapping[str, torch.Tensor]]) -> ExpertWeights:
        """Format fp8_block from checkpoints of DeepSeek-V3 to V4, Kimi-K2 and GLM-5, one mapping an expert.

        Each maps gate_proj.weight, up_proj.weight [I, H] and down_proj.weight [H, I] (float8_e4m3fn or uint8) and, for
        each, .weight_scale_inv [ceil(N/128), ceil(K/128)] (fp32, bf16, fp16 or float8_e8m0fnu): the names of a state
        dict after ``experts.{e}.``. V4's w1.weight, w1.scale and so on are taken, too. A mapping may load a tensor when
        it is asked for one. What transformers has fused, gate_up_proj [E, 2I, H] with gate_up_proj_scale_inv, is in
        this layout and goes to the constructor.

        Raises:
            KeyError: a missing name. ValueError: shapes that do not fit, NaN codes, scales that are not finite.
            NotImplementedError: 128 does not divide I, so that gate's blocks of scales cannot be followed by up's.
        """
        return cls._from_projections(WeightFormat.FP8_BLOCK, experts, read_fp8)

    @classmethod
    def from_compressed_tensors(
        cls, experts: Sequence[Mapping[str, torch.Tensor]], *, format: WeightFormat | str = WeightFormat.INT4
    ) -> ExpertWeights:
        """Format int4, or int8, from compressed-tensors' integer weights, one mapping an expert: Kimi-K2-Thinking's.

        Each maps, for each of gate_proj, up_proj and down_proj [N, K] ("pack-quantized"): .weight_packed int32, of 4
        bits [N, K/8] (column 8 w + i in bits 4 i of word w) or of 8 bits [N, K/4], codes less their least value;
        .weight_scale [N, K/group], group 32, 64 or 128, or [N, 1] for whole rows; .weight_shape (N, K); and, where
        zeros are not 0, .weight_zero_point int32 [N/8, K/group], eight rows a word. Or ("int-quantized") .weight int8
        [N, K] and .weight_scale [N, 1]. A scale of a whole 4-bit row is repeated for each of its groups.

        Args:
            format: "int4" for 4 bits; "int8" for 8 bits, or "int8_w8a8", which quantises activations too.

        Raises:
            KeyError: a missing name. ValueError: shapes that do not fit, bits of another format, a group size that is
            not 32, 64 or 128. NotImplementedError: columns in act-order (weight_g_idx not ascending by groups); 8 bits
            in groups or with zeros.
        """
        accepted = (WeightFormat.INT4.value, WeightFormat.INT8.value, WeightFormat.INT8_W8A8.value)
        check_choice("format", format, accepted)
        return cls._from_projections(WeightFormat(format), experts, read_compressed_tensors)

    @classmethod
    def from_mxfp4(
        cls,
        gate_up_blocks: torch.Tensor,
        gate_up_scales: torch.Tensor,
        down_blocks: torch.Tensor,
        down_scales: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """Format mxfp4 from gpt-oss's tensors: blocks uint8 [E, N, K/32, 16] and scales uint8 [E, N, K/32].

        A byte of theirs holds an even column in its low nibble and the next, odd one in its high nibble. Blocks of
        shape [E, N, K/2] (uint8 or int8, DeepSeek-V4's) and scales of dtype float8_e8m0fnu are taken, too. Rows stay
        where they are: gpt-oss's gate_up has gate in even and up in odd rows, hence
        ``Activation("gpt_oss", limit=7.0, interleaved=True)``.

        Raises:
            ValueError: shapes that do not fit, H or I below 128. TypeError: a wrong dtype.
        """
        gate_up, gate_up_scale = mxfp4_projection("gate_up", gate_up_blocks, gate_up_scales)
        down, down_scale = mxfp4_projection("down", down_blocks, down_scales)
        return cls(
            WeightFormat.MXFP4, gate_up, down, gate_up_scale, down_scale, None, None, gate_up_bias, down_bias, GROUP
        )

    @classmethod
    def from_mxfp4_experts(cls, experts: Sequence[Mapping[str, torch.Tensor]]) -> ExpertWeights:
        """Format mxfp4 from one mapping an expert, as DeepSeek-V4 publishes them.

        Each maps w1.weight, w3.weight (gate and up, int8 [I, H/2]) and w2.weight (int8 [H, I/2]), an even column in a
        byte's low nibble and the next in its high one, and w1.scale [I, H/32] and so on (float8_e8m0fnu or uint8).
        gate_proj, up_proj and down_proj are taken, too.

        Raises:
            KeyError: a missing name. ValueError: shapes that do not fit, H or I below 128. TypeError: a wrong dtype.
        """
        return cls._from_projections(WeightFormat.MXFP4, experts, read_mxfp4)

    @classmethod
    def from_gptq(cls, experts: Sequence[Mapping[str, torch.Tensor]], *, version: int = 1) -> ExpertWeights:
        """Format int4 from GPTQ checkpoints of 4 bits, one mapping an expert.

        Each maps, for each of gate_proj, up_proj and down_proj: .qweight int32 [K/8, N], eight columns a word, the
        first in the lowest bits; .scales [K/group, N]; .qzeros int32 [K/group, N/8]; and, if there, .g_idx int32 [K],
        the group of each column.

        Args:
            version: 1 stores each word of eight zeros less 0x11111111, so that a zero of 0 borrows from the next
                (``checkpoint_format`` "gptq", as gptqmodel writes it), 2 stores them as they are ("gptq_v2").

        Raises:
            KeyError: a missing name. ValueError: shapes that do not fit, a group size that is not 32, 64 or 128.
            NotImplementedError: columns in act-order (g_idx not ascending by groups): a scale would not belong to
            neighbours.
        """
        check_choice("version", version, (1, 2))
        return cls._from_projections(WeightFormat.INT4, experts, read_gptq, version)

    @classmethod
    def from_awq(cls, experts: Sequence[Mapping[str, torch.Tensor]]) -> ExpertWeights:
        """Format int4 from AWQ checkpoints (GEMM version, 4 bits), one mapping an expert.

        Each maps, for each of gate_proj, up_proj and down_proj: .qweight int32 [K, N/8], whose nibbles from the lowest
        bits up are rows 0, 2, 4, 6, 1, 3, 5, 7 of eight; .qzeros int32 [K/group, N/8] likewise; .scales [K/group, N].

        Raises:
            KeyError: a missing name. ValueError: shapes that do not fit, a group size that is not 32, 64 or 128.
        """
        return cls._from_projections(WeightFormat.INT4, experts, read_awq)

    @classmethod
    def _from_projections(cls, format, experts, read, *arguments):
        """Every expert's three projections read and written to their places, one expert in memory at a time."""
        if not isinstance(experts, Sequence) or not experts:
            raise TypeError(f"experts: got {type(experts).__name__}, a sequence of at least one mapping is accepted")

        def projections():
            for number, tensors in enumerate(experts):
                where, stored = f"experts[{number}]", {}
                for published, name in PUBLISHED.items():
                    own = published if f"{published}.weight" in tensors else name
                    stored[name] = read(f"{where}: {name}", tensors, own, *arguments)
                yield where, stored

        return from_parts(format, stack_experts(format, len(experts), projections()))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [E, 2I, H] and down [E, H, I] in ``dtype`` (a float dtype), each value rounded once."""
        result = []
        for name in ("gate_up", "down"):
            whole = self.gate_up.new_empty(self.num_experts, *weight_shape(self, name), dtype=dtype)
            for expert in range(self.num_experts):
                whole[expert] = dequantise_weight(self, name, expert, dtype)
            result.append(whole)
        return tuple(result)

    def prepack(self) -> int:
        """On the CPU: keep a copy in the layout that torch multiplies fastest, which :func:`fused_experts` then uses.

        int4: half a byte a weight and 4 bytes a group, for bfloat16 activations and up to 16 rows an expert. fp8_block
        and mxfp4: the bfloat16 weights, 2 bytes each, for bfloat16 activations, which else are made anew at each call.
        plain: :func:`mla_kernels.cpu.prepack`. int8 and int8_w8a8 multiply their codes as they are. The copy belongs to
        the tensors: it is freed with them and no longer used once one is changed in place.

        Returns:
            Bytes that the copy takes, 0 where there is none.

        Raises:
            ValueError: tensors that are not on the CPU. NotImplementedError: this torch has no such product; int4 with
            H or 2I that 16 does not divide.
        """
        if self.device.type != "cpu":
            raise ValueError(f"prepack: got weights on {self.device}, cpu is accepted")
        if self.format is WeightFormat.PLAIN:
            return prepack(gate_up=self.gate_up, down=self.down)
        if self.format not in (WeightFormat.INT4, WeightFormat.FP8_BLOCK, WeightFormat.MXFP4):
            return 0
        gate_up = self.gate_up, self.gate_up_scale, self.gate_up_zero, self.hidden_size
        down = self.down, self.down_scale, self.down_zero, self.intermediate_size
        return prepack_quantised(self.format.value, [gate_up, down])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors there are, by attribute, as ``safetensors.torch.save_file`` takes them."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def metadata(self) -> dict[str, str]:
        """What :meth:`from_tensors` needs besides the tensors; strings, for the metadata of a safetensors file."""
        return {"format": self.format.value} | ({} if self.group_size is None else {"group_size": str(self.group_size)})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> ExpertWeights:
        """The inverse of :meth:`tensors` and :meth:`metadata`.

        Raises:
            KeyError: metadata without a format. ValueError: an unknown name of a tensor, and what the class refuses.
        """
        for name in tensors:
            check_choice("tensors: name", name, _TENSORS)
        for name in ("gate_up", "down"):
            if name not in tensors:
                raise ValueError(f"tensors: got none named {name!r}, which every format has")
        group_size = metadata.get("group_size")
        return cls(metadata["format"], **tensors, group_size=None if group_size is None else int(group_size))

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights on another device; self if they are there."""
        device = torch.device(device)
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self if all(moved[name] is getattr(self, name) for name in moved) else replace(self, **moved)


def from_parts(format: WeightFormat, parts: Mapping[str, torch.Tensor]) -> ExpertWeights:
    """From tensors by attribute whose shapes tell the group size; zeros that are 8 everywhere are left out."""
    group_size = None
    if format is WeightFormat.INT4:
        zeros = {name: tensor for name, tensor in parts.items() if name.endswith("_zero")}
        if all((zero == SYMMETRIC_ZERO).all() for zero in zeros.values()):
            parts = {name: tensor for name, tensor in parts.items() if name not in zeros}
        group_size = parts["down"].shape[1] // max(parts["gate_up_scale"].shape[-1], 1)
    return ExpertWeights(format, **parts, group_size=group_size)


def as_stored(name, tensor, format):
    """Eight-bit floats as the format has them: bytes, but for ue8m0 scales of fp8_block, which become fp32."""
    dtype = getattr(tensor, "dtype", None)
    if dtype == torch.float8_e8m0fnu and name.endswith("scale") and format is WeightFormat.FP8_BLOCK:
        return tensor.float()
    own = torch.float8_e8m0fnu if name.endswith("scale") else torch.float8_e4m3fn
    byte_wide = WeightFormat.MXFP4 if name.endswith("scale") else WeightFormat.FP8_BLOCK
    return tensor.view(torch.uint8) if dtype == own and format is byte_wide else tensor


def _group_size(format: WeightFormat, group_size: int | None) -> int | None:
    accepted = {WeightFormat.INT4: GROUP_SIZES, WeightFormat.MXFP4: (None, GROUP)}.get(format, (None,))
    if group_size not in accepted:
        choices = ", ".join(map(str, accepted))
        raise ValueError(f"group_size: got {group_size}, with format {format.value!r} accepted: {choices}")
    return GROUP if format is WeightFormat.MXFP4 else group_size


def _check(experts: ExpertWeights) -> None:
    """Refuse tensors that are not what the format says."""
    layout, label = FORMATS[experts.format], f"format {experts.format.value!r}"
    for name in _TENSORS:
        value = getattr(experts, name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, a torch.Tensor is accepted")
    gate_up, down = experts.gate_up, experts.down
    for name, codes in (("gate_up", gate_up), ("down", down)):
        if codes is None or codes.dtype not in layout.codes:
            got = "None" if codes is None else str(codes.dtype)
            raise TypeError(f"{name}: got {got}, {label} has codes of {', '.join(map(str, layout.codes))}")
        if codes.dim() != 3:
            raise ValueError(f"{name}: got {codes.dim()} dimensions {tuple(codes.shape)}, 3 are accepted")
    if gate_up.dtype != down.dtype or gate_up.device != down.device:
        raise ValueError(f"down: got {down.dtype} on {down.device}, gate_up's are {gate_up.dtype} on {gate_up.device}")
    check_int("number of experts (gate_up.shape[0])", gate_up.shape[0], 1, 1024)
    doubled, hidden = gate_up.shape[1], down.shape[1]
    if doubled % 2 or doubled == 0:
        raise ValueError(f"gate_up: got {doubled} rows an expert, an even number is accepted (gate's and up's)")
    for name, rows, columns in (("gate_up", doubled, hidden), ("down", hidden, doubled // 2)):
        codes = getattr(experts, name)
        layout.check_columns(name, columns, experts.group_size)
        wanted = gate_up.shape[0], rows, layout.row_length(columns)
        if codes.shape != wanted:
            sizes = f"E {gate_up.shape[0]}, H {hidden} (down's rows), I {doubled // 2} (half of gate_up's rows)"
            raise ValueError(f"{name}: got shape {tuple(codes.shape)}, with {sizes} {label} has {wanted}")
        if not codes.is_contiguous() and not (layout.strided and 1 in (codes.stride(1), codes.stride(2))):
            raise ValueError(f"{name}: got strides {codes.stride()}, a contiguous tensor is accepted")
        scale, zero, bias = (getattr(experts, f"{name}_{part}") for part in ("scale", "zero", "bias"))
        scale_shape = layout.scale_shape(rows, columns, experts.group_size)
        if scale_shape is None:
            _refuse(f"{name}_scale", scale, label)
        else:
            _require(f"{name}_scale", scale, label, (gate_up.shape[0], *scale_shape), layout.scales, codes.device)
        if not layout.zeros:
            _refuse(f"{name}_zero", zero, label)
        elif zero is not None:
            _require(f"{name}_zero", zero, label, tuple(scale.shape), (torch.uint8,), codes.device)
        if bias is not None:
            _require(f"{name}_bias", bias, label, (gate_up.shape[0], rows), FLOATS, codes.device)
    for part in ("scale", "zero", "bias"):
        first, second = getattr(experts, f"gate_up_{part}"), getattr(experts, f"down_{part}")
        if part == "zero" and (first is None) != (second is None):
            raise ValueError("gate_up_zero, down_zero: got one of them, both or neither are accepted")
        if first is not None and second is not None and first.dtype != second.dtype:
            raise TypeError(f"down_{part}: got {second.dtype}, gate_up_{part} has {first.dtype}")


def _refuse(name, value, label):
    if value is not None:
        raise ValueError(f"{name}: got a tensor, {label} has none")


def _require(name, value, label, shape, dtypes, device):
    if value is None:
        raise ValueError(f"{name}: got None, {label} has {shape}")
    check_tensor(f"{name} of {label}", value, shape=shape, dtypes=dtypes, device=device)
    if not value.is_contiguous():
        raise ValueError(f"{name}: got strides {value.stride()}, a contiguous tensor is accepted")
