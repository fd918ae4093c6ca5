"""State dicts of MoE: the names and shapes of checkpoints, over stacked routed and shared experts."""

import torch

PUBLISHED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""DeepSeek-V4's own names of an expert's projections, and Hugging Face's."""


def split_experts(module, state_dict, prefix, local_metadata) -> None:
    """After ``state_dict``: the stacked experts become the routed experts and the shared ones' three weights."""
    gate_up, down = (state_dict.get(f"{prefix}experts.{name}") for name in ("gate_up_proj", "down_proj"))
    if gate_up is None:  # quantised experts
        return
    routed, inner, shared = module.num_local, module.config.intermediate_size, module.config.num_shared
    state_dict[f"{prefix}experts.gate_up_proj"] = gate_up[:routed]
    state_dict[f"{prefix}experts.down_proj"] = down[:routed]
    if shared:
        state_dict[f"{prefix}shared_experts.gate_proj.weight"] = gate_up[routed:, :inner].flatten(0, 1)
        state_dict[f"{prefix}shared_experts.up_proj.weight"] = gate_up[routed:, inner:].flatten(0, 1)
        state_dict[f"{prefix}shared_experts.down_proj.weight"] = down[routed:].permute(1, 0, 2).flatten(1)


def merge_experts(module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    """Before ``load_state_dict``: the weights of a checkpoint, by any of its names, go into the stacked experts."""
    names = [f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"]
    if not hasattr(module.experts, "gate_up_proj"):  # quantised experts
        return
    _rename(state_dict, prefix)
    stacked = [module.experts.gate_up_proj.data, module.experts.down_proj.data]
    assigned = local_metadata.get("assign_to_params_buffers", False)
    if assigned:  # the checkpoint's tensors stay, so theirs are the dtype and the device
        like = next((x for name, x in state_dict.items() if name.startswith(f"{prefix}experts.")), None)
        if like is None:
            return
        stacked = [like.new_empty(x.shape) for x in stacked]
    complete = True
    for name, target in _places(module, state_dict, prefix, *stacked).items():
        value = state_dict.pop(prefix + name, None)
        if target is None:  # an expert of another rank
            continue
        if value is None:
            missing.append(prefix + name)
            complete = False
        elif tuple(value.shape) != target.accepts:
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {tuple(value.shape)} from checkpoint, "
                f"the shape in current model is {target.accepts}."
            )
        else:
            with torch.no_grad():
                target.copy(value)
    if complete or not assigned:
        state_dict.update(zip(names, stacked))


class _Place:
    """A part of a stacked weight, and how a tensor of a checkpoint is turned to fit it."""

    def __init__(self, part, accepts, turn=lambda value: value):
        self.part, self.accepts, self.turn = part, tuple(accepts), turn

    def copy(self, value):
        value = self.turn(value)
        same = value.untyped_storage().data_ptr() == self.part.untyped_storage().data_ptr()  # this module's own state
        self.part.copy_(value.clone() if same else value)


def _places(module, state_dict, prefix, gate_up, down):
    """Name of a checkpoint's tensor -> where it goes; None for one that belongs to another rank."""
    config, routed, inner = module.config, module.num_local, module.config.intermediate_size
    own = slice(0, routed) if module.parallel is None else module.parallel.local
    places = {}
    if any(f"{prefix}experts.{expert}.up_proj.weight" in state_dict for expert in range(config.num_experts)):
        for expert in range(config.num_experts):
            parts = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
            if own.start <= expert < own.stop:
                here = expert - own.start
                parts = {"gate_proj": gate_up[here, :inner], "up_proj": gate_up[here, inner:], "down_proj": down[here]}
            for name, part in parts.items():
                places[f"experts.{expert}.{name}.weight"] = None if part is None else _Place(part, part.shape)
    else:
        for name, part in {"experts.gate_up_proj": gate_up[:routed], "experts.down_proj": down[:routed]}.items():
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[:1] == (config.num_experts,) and routed != config.num_experts:
                places[name] = _Place(part, (config.num_experts, *part.shape[1:]), lambda value: value[own])
            else:
                places[name] = _Place(part, part.shape)
    shared = config.num_shared
    if shared:
        wide = shared * inner
        for name, part in {"gate_proj": gate_up[routed:, :inner], "up_proj": gate_up[routed:, inner:]}.items():
            accepts = (wide, config.hidden_size)
            places[f"shared_experts.{name}.weight"] = _Place(part, accepts, lambda x: x.unflatten(0, (shared, inner)))
        places["shared_experts.down_proj.weight"] = _Place(
            down[routed:], (config.hidden_size, wide), lambda x: x.unflatten(1, (shared, inner)).permute(1, 0, 2)
        )
    return places


def _rename(state_dict, prefix):
    """DeepSeek-V4's published names become Hugging Face's."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        parts = name.removeprefix(prefix).split(".")
        if parts[0] in ("experts", "shared_experts") and len(parts) > 2 and parts[-2] in PUBLISHED:
            parts[-2] = PUBLISHED[parts[-2]]
        elif parts == ["gate", "bias"]:
            parts[-1] = "e_score_correction_bias"
        state_dict[prefix + ".".join(parts)] = state_dict.pop(name)
