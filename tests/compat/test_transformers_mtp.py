"""Speculative decoding of an enabled DeepSeek-V3 with its own MTP layer, as transformers runs it since 5.24."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM, modeling_layers

from mla_kernels.compat.transformers import enable
from tests.compat.models import VOCABULARY, fast_cpu, tiny


def save_with_mtp(model, folder):
    """The model's file, with an MTP layer behind its last, as DeepSeek's file has it."""
    model.save_pretrained(folder)
    last, file = model.config.num_hidden_layers, load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    mtp = modeling_layers.MtpModel(model, 1)
    for name, tensor in mtp.layers[0].state_dict().items():
        own = f"model.layers.{last}.{name.removeprefix('mtp_block.').replace('post_norm', 'shared_head.norm')}"
        low, high = (0.5, 1.5) if "norm" in name else (-0.25, 0.25)
        value = torch.empty_like(tensor).uniform_(low, high, generator=generator)
        if ".experts." not in own:
            file[own] = value
            continue
        stem, part = own.rsplit(".", 1)
        for expert, one in enumerate(value):
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for each, weight in zip(names, one.chunk(len(names))):
                file[f"{stem}.{expert}.{each}.weight"] = weight.contiguous()
    save_file(file, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("use_mtp", [False, True] if hasattr(modeling_layers, "MtpModel") else [False])
def test_generate_with_mtp(tmp_path, use_mtp):
    """Two tokens a step, of which the draft is given back where it was wrong: the same text."""
    with fast_cpu():
        options = {"use_mtp": True} if use_mtp else {}
        save = save_with_mtp if use_mtp else lambda model, folder: model.save_pretrained(folder)
        save(tiny("DeepseekV3"), tmp_path)
        model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        model.eval().requires_grad_(False)
        # transformers looks for MTP layers by the number that the released model's has
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\."]
        ids = torch.randint(2, VOCABULARY, (1, 31))
        length = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected, theirs = model.generate(ids, **length), model.generate(ids, **options, **length)
        assert torch.equal(theirs, expected)
        steps = []
        enable(model).model.register_forward_pre_hook(
            lambda module, args, kwargs: steps.append((kwargs.get("input_ids") if not args else args[0]).shape[1]),
            with_kwargs=True,
        )
        assert torch.equal(model.generate(ids, **options, **length), expected)
        assert steps[0] == 31 and set(steps[1:-1]) == {2 if use_mtp else 1}, "drafts are checked along"
