"""State dicts of MoE: the names and shapes of checkpoints, over stacked routed and shared experts."""

import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla_kernels.moe.quantised.converters import DOWN, GATE, PUBLISHED, UP, check_format, write_projection
from mla_kernels.moe.quantised.formats import WeightFormat
from mla_kernels.nn.experts import QuantizedExperts, check_codes
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.quant.nibbles import BLOCK
from mla_kernels.quant.stored import NUMBERS, StoredWeight, names_of, read_codes, read_weight

_ALL = slice(None)


def split_experts(module, state_dict, prefix, local_metadata) -> None:
    """After ``state_dict``: stacked plain experts become the routed experts and the shared ones' three weights."""
    inner = module.config.intermediate_size
    for name, routed in (("experts", module.num_local), ("shared_experts", 0)):
        stacked = [f"{prefix}{name}.{part}_proj" for part in ("gate_up", "down")]
        if stacked[0] not in state_dict:  # quantised experts, or none apart
            continue
        gate_up, down = (state_dict.pop(key) for key in stacked)
        if routed:
            state_dict[stacked[0]], state_dict[stacked[1]] = gate_up[:routed], down[:routed]
        if gate_up.shape[0] > routed:
            shared = f"{prefix}shared_experts."
            state_dict[f"{shared}gate_proj.weight"] = gate_up[routed:, :inner].flatten(0, 1)
            state_dict[f"{shared}up_proj.weight"] = gate_up[routed:, inner:].flatten(0, 1)
            state_dict[f"{shared}down_proj.weight"] = down[routed:].permute(1, 0, 2).flatten(1)


def merge_experts(module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    """Before ``load_state_dict``: the weights of a checkpoint, by any of its names, go into the stacked experts.

    Codes become numbers of the parameters' dtype, or codes of quantised experts. All are looked at before any is
    written.
    """
    _rename(state_dict, prefix)
    dequantise_state(module.gate, state_dict, f"{prefix}gate.")
    assigned = local_metadata.get("assign_to_params_buffers", False)
    routed = shared = _Stack(module.experts, f"{prefix}experts.", state_dict, assigned)
    if module.shared_apart:
        shared = _Stack(module.shared_experts, f"{prefix}shared_experts.", state_dict, assigned)
    places = _routed_places(module, state_dict, prefix, routed) | _shared_places(module, shared)
    found = {}
    for name, place in places.items():
        if place is None:  # an expert of another rank
            for key in names_of(state_dict, prefix + name.removesuffix(".weight")):
                del state_dict[key]
            continue
        found[name] = _read(state_dict, prefix + name)
        place.check(prefix + name, found[name][0])
    for name, (value, used) in found.items():
        place = places[name]
        for key in used:
            del state_dict[key]
        if value is None:
            missing.append(prefix + name)
        elif tuple(value.shape) != place.accepts:
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {tuple(value.shape)} from checkpoint, "
                f"the shape in current model is {place.accepts}."
            )
        else:
            with torch.no_grad():
                place.write(prefix + name, value)
    state_dict.update(routed.named() | shared.named())


class _Stack:
    """The stacked tensors of some experts that weights are written to.

    They are the module's own; with ``assign=True``, where the checkpoint's device or dtype is another, copies there.
    """

    def __init__(self, experts, prefix, state_dict, assigned):
        self.quantised, self.prefix = isinstance(experts, QuantizedExperts), prefix
        self.complete = False  # its own state dict: nothing to merge
        if self.quantised:
            self.format, self.tensors = experts.format, dict(experts.named_buffers())
            self.complete = f"{prefix}gate_up" in state_dict
            check_codes(experts, state_dict, prefix)
        else:
            self.tensors = {name.removesuffix("_proj"): value.data for name, value in experts.named_parameters()}
        own = self.tensors["gate_up"]
        theirs = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        self.lost = bool(theirs) and own.is_meta and not assigned
        if assigned and theirs and not self.complete:
            device, dtype = next(iter(theirs.values())).device, own.dtype
            if not self.quantised:
                weights = (value.dtype for name, value in theirs.items() if name.endswith(("weight", "_proj")))
                dtype = next((found for found in weights if found in NUMBERS), dtype)
            if (device, dtype) != (own.device, own.dtype):
                options = {"device": device} if self.quantised else {"device": device, "dtype": dtype}
                self.tensors = {
                    name: torch.zeros_like(value, **options) if own.is_meta else value.to(**options)
                    for name, value in self.tensors.items()
                }

    def write(self, where, cell, value):
        """One projection of one expert: codes as they are, or numbers."""
        if self.quantised:
            stored = value.part(cell.rows, cell.columns)
            write_projection(where, self.tensors, cell.expert, cell.projection, stored)
            return
        value = value[cell.rows, cell.columns]
        place = self.tensors["down" if cell.projection == DOWN else "gate_up"][cell.expert]
        if cell.projection != DOWN:
            place = place.chunk(2)[cell.projection == UP]
        same = value.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()  # this module's own state
        place.copy_(value.clone() if same else value)

    def named(self):
        """What of it goes into the state dict."""
        if self.complete:
            return {}
        if self.lost:
            warnings.warn(
                f"{self.prefix}: nothing was loaded into experts on the meta device, pass assign=True for that",
                stacklevel=2,
            )
        return {self.prefix + name + ("" if self.quantised else "_proj"): value for name, value in self.tensors.items()}


class _Cell(NamedTuple):
    """Where a part of a checkpoint's tensor goes: a projection of one expert of a stack."""

    expert: int
    projection: str
    rows: slice = _ALL
    columns: slice = _ALL
    source: int | None = None  # which expert of a stacked tensor


@dataclass(frozen=True)
class _Place:
    """What a tensor of a checkpoint is for, and the shape it must have."""

    stack: _Stack
    accepts: tuple[int, ...]
    cells: list[_Cell]

    def check(self, where, value) -> None:
        """Refuse stacked codes that do not fit, and what quantised experts do not hold."""
        if value is None or tuple(value.shape) != self.accepts:
            return
        if isinstance(value, _StackedCodes):
            for expert in {cell.source for cell in self.cells}:
                value[expert]
        if not self.stack.quantised:
            return
        format = self.stack.format
        if isinstance(value, torch.Tensor):
            raise TypeError(
                f"{where}: got {value.dtype}, experts of format {format.value!r} are loaded from codes; load numbers "
                "into a MoE without expert_format and call to_quantized, or give shared experts shared_format='plain'"
            )
        stored = value[0] if isinstance(value, _StackedCodes) else value
        check_format(where, stored, format)
        if len(self.cells) > 1 and any(cell.columns != _ALL for cell in self.cells):
            width = self.cells[0].columns.stop
            if width % BLOCK:
                raise NotImplementedError(
                    f"{where}: got several shared experts of an intermediate size of {width}, multiples of {BLOCK} are "
                    "accepted in codes"
                )
        if format is WeightFormat.INT4:
            self._check_int4(where, stored)

    def _check_int4(self, where, stored):
        own = self.stack.tensors["gate_up_scale"]
        group_size = self.stack.tensors["down"].shape[1] // own.shape[2]
        symmetric = "gate_up_zero" not in self.stack.tensors
        given = stored.shape[1] // stored.scales.shape[1], stored.scales.dtype
        if given != (group_size, own.dtype) or (symmetric and stored.zeros is not None):
            raise ValueError(
                f"{where}: got group_size={given[0]}, scale_dtype={given[1]}, symmetric={stored.zeros is None}; these "
                f"experts have group_size={group_size}, scale_dtype={own.dtype}, symmetric={symmetric}: pass MoE what "
                "the checkpoint has"
            )

    def write(self, where, value) -> None:
        """Write all parts of ``value`` to their experts."""
        dtype, numbers, last = self.stack.tensors["gate_up"].dtype, value, None
        for cell in self.cells:
            if self.stack.quantised:
                self.stack.write(where, cell, value if cell.source is None else value[cell.source])
                continue
            if last is None or cell.source != last.source:
                numbers = value if cell.source is None else value[cell.source]
                numbers = numbers.values(dtype) if isinstance(numbers, StoredWeight) else numbers
            self.stack.write(where, cell, numbers)
            last = cell


@dataclass(frozen=True)
class _StackedCodes:
    """Codes [E, N, K] and scales of stacked experts, as transformers saves them."""

    where: str
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self):
        return len(self.codes), *self[0].shape

    def __getitem__(self, expert) -> StoredWeight:
        names = f"{self.where}[{expert}]", f"{self.where}_scale_inv[{expert}]"
        return read_codes(names[0], self.codes[expert], names[1], self.scales[expert])


def _routed_places(module, state_dict, prefix, stack) -> dict[str, _Place | None]:
    """By the name of a checkpoint's tensor; None for one that belongs to another rank."""
    if stack.complete:
        return {}
    config, routed, inner = module.config, module.num_local, module.config.intermediate_size
    own = slice(0, routed) if module.parallel is None else module.parallel.local
    single = re.compile(re.escape(f"{prefix}experts.") + r"\d+\.")
    first = next((name for name in state_dict if single.match(name)), None)
    both = state_dict.get(f"{prefix}experts.gate_up_proj")
    if first is not None and both is not None:
        raise ValueError(f"{prefix}experts.gate_up_proj: got stacked experts beside {first}, one of both is accepted")
    places = {}
    if first is not None:
        for expert in range(config.num_experts):
            for projection in (GATE, UP, DOWN):
                accepts = (config.hidden_size, inner) if projection == DOWN else (inner, config.hidden_size)
                place = _Place(stack, accepts, [_Cell(expert - own.start, projection)])
                places[f"experts.{expert}.{projection}.weight"] = place if own.start <= expert < own.stop else None
        return places
    for name, rows in (("gate_up_proj", 2 * inner), ("down_proj", config.hidden_size)):
        value = state_dict.get(f"{prefix}experts.{name}")
        all_experts = value is not None and value.shape[:1] == (config.num_experts,)
        number, start = (config.num_experts, own.start) if all_experts else (routed, 0)
        cells = []
        for expert in range(routed):
            if name == "down_proj":
                cells.append(_Cell(expert, DOWN, source=start + expert))
            else:
                cells.append(_Cell(expert, GATE, slice(0, inner), source=start + expert))
                cells.append(_Cell(expert, UP, slice(inner, 2 * inner), source=start + expert))
        columns = inner if name == "down_proj" else config.hidden_size
        places[f"experts.{name}"] = _Place(stack, (number, rows, columns), cells)
    return places


def _shared_places(module, stack) -> dict[str, _Place]:
    """The shared experts' three weights, each cut into experts of the routed ones' size."""
    config, shared, inner = module.config, module.config.num_shared, module.config.intermediate_size
    if stack.complete or not shared:
        return {}
    first, wide, places = 0 if module.shared_apart else module.num_local, shared * inner, {}
    parts = [(first + index, slice(index * inner, (index + 1) * inner)) for index in range(shared)]
    for projection in (GATE, UP):
        cells = [_Cell(expert, projection, rows=part) for expert, part in parts]
        places[f"shared_experts.{projection}.weight"] = _Place(stack, (wide, config.hidden_size), cells)
    cells = [_Cell(expert, DOWN, columns=part) for expert, part in parts]
    places[f"shared_experts.{DOWN}.weight"] = _Place(stack, (config.hidden_size, wide), cells)
    return places


def _read(state_dict, key):
    """The weight called ``key``, None if there is none, and the names of what it is made of."""
    if key.endswith(".weight"):
        stem = key.removesuffix(".weight")
        return read_weight(stem, state_dict, stem)
    value, scales = state_dict.get(key), f"{key}_scale_inv"
    if value is None:
        return None, ()
    if value.dtype in NUMBERS:
        if scales in state_dict:
            raise TypeError(f"{scales}: got scales for weights of {value.dtype}, codes are accepted with them")
        return value, (key,)
    if scales not in state_dict:
        raise TypeError(
            f"{key}: got codes ({value.dtype}) without scales ({scales}); codes are no numbers: pass the scales with "
            "them, or dequantise the weights first"
        )
    if value.dim() != 3 or not len(value) or state_dict[scales].shape[:1] != value.shape[:1]:
        raise ValueError(
            f"{key}: got shape {tuple(value.shape)} with scales of {tuple(state_dict[scales].shape)}, three dimensions "
            "and as many experts in both are accepted"
        )
    return _StackedCodes(key, value, state_dict[scales]), (key, scales)


def _rename(state_dict, prefix):
    """DeepSeek-V4's published names become Hugging Face's."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        parts = name.removeprefix(prefix).split(".")
        if parts[0] in ("experts", "shared_experts") and len(parts) > 2 and parts[-2] in PUBLISHED:
            parts[-2] = PUBLISHED[parts[-2]]
        elif parts == ["gate", "bias"]:
            parts[-1] = "e_score_correction_bias"
        state_dict[prefix + ".".join(parts)] = state_dict.pop(name)
