"""What a rank does in the tests of models that transformers shards over processes."""

import os

import torch

from tests.compat.models import CACHE, VOCABULARY, fast_cpu, tiny


def shard(model, rank: int, size: int, options: dict):
    """Shard a model as ``from_pretrained(distributed_config=...)`` does, which needs accelerate."""
    from transformers.distributed import DistributedConfig

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(**options))
    return type(model).maybe_distribute_model(model, config, mesh)


def _tokens(model, new: int):
    ids = torch.randint(2, VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, :9] = 0
    options = dict(attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    out = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits), type(out[CACHE].layers[-1]).__name__


def generate(rank: int, size: int, family: str, changes: dict, options: dict, new: int) -> list[tuple]:
    """Tokens, logits and kind of cache: by one process, by the ranks, by the ranks enabled, and disabled again."""
    from mla_kernels.compat.transformers import disable, enable

    with fast_cpu():
        model = tiny(family, **changes)
        outs = [_tokens(model, new)]
        model = shard(model, rank, size, options)
        return outs + [_tokens(switch(model), new) for switch in (disable, enable, disable)]


def gradients(rank: int, size: int, family: str, changes: dict, options: dict) -> list[tuple]:
    """(name, this rank's part of the gradient, the same of one process's gradient) of every parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    from mla_kernels.compat.transformers import enable

    ids = torch.randint(2, VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(2))
    models = tiny(family, **changes), enable(shard(tiny(family, **changes), rank, size, options))
    with fast_cpu(), torch.enable_grad():
        for model in models:
            model.requires_grad_(True)
            model(ids, labels=ids, use_cache=False).loss.backward()
    results = []
    for (name, whole), part in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        expected, actual = whole.grad, part.grad
        if isinstance(actual, DTensor):
            expected = distribute_tensor(expected, actual.device_mesh, actual.placements, src_data_rank=None).to_local()
            actual = actual.to_local()
        results.append((name, actual, expected))
    return results
