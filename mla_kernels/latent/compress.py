"""compress_latent: down-projection, RMSNorm, RoPE and the write to the paged latent cache.

Two launches: the product is the vendor's (this library's own where bits must not depend on the batch), and
:mod:`mla_kernels.latent.write` does the rest. One kernel for both must hold whole rows in one program, since the norm
runs over them, and so keeps few cores busy: on an H200 it took 7 to 20 times as long (docs/performance.md).
"""

import torch

from mla_kernels.checks import any_requires_grad, check_no_grad, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import wanted
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.product import launch_linear
from mla_kernels.latent.write import check_cache, check_latent_arguments, check_slots, launch_write
from mla_kernels.shim import define_op


def _launch(
    hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps,
    batch_invariant=False,
):  # fmt: skip
    kv_a = launch_linear(hidden, weight) if batch_invariant else torch.mm(hidden, weight.t())
    launch_write(
        kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps, batch_invariant
    )


def _check_values(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, *_):
    check_slots(positions, slot_mapping, cos, cache)


def _fake(*_):
    return None


_compress_latent = define_op(
    "compress_latent",
    "(Tensor hidden, Tensor weight, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor slot_mapping, Tensor(a!) cache, str layout, int latent_dim, str rope, float eps=1e-06, "
    "bool batch_invariant=False) -> ()",
    cpu=by_row(cpu_latent.compress_latent, 0, 5, 6),
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def compress_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LatentCache,
    *,
    rope: str,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> None:
    """Down-project hidden states, normalise and rotate them, and write them to their cache slots, in place.

    The same as :func:`mla_kernels.write_latent` of ``hidden @ weight.T``, quantised caches included, in two launches:
    torch's product, rounded to ``cache.dtype``, and the write.

    Args:
        hidden: ``[tokens, hidden_size]``, in ``cache.dtype``. Rows may have any stride.
        weight: ``[latent_dim + rope_dim, hidden_size]``, ``kv_a_proj_with_mqa.weight``, in ``cache.dtype``.
        norm_weight: ``[latent_dim]``, in ``cache.dtype``.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them.
        positions: ``[tokens]`` int32 or int64, each token's row of the tables.
        slot_mapping: ``[tokens]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call
            other than -1 must differ: of two tokens with one slot either may win, or parts of both.
        cache: the :class:`LatentCache` written to. Slots that are not named keep their bits.
        rope: ``"interleaved_to_half"`` (DeepSeek-V3), ``"interleaved"`` (DeepSeek-V2) or ``"half"`` (MiniCPM3); see
            ``write_latent``.
        eps: added to the mean square.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says. On devices the product is then this library's, in one tile for
            every number of tokens, and not torch's.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no LatentCache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or the widths do not fit the chip.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2; Hugging Face ``DeepseekV3Attention.forward``.
    """
    check_cache(cache, "compress_latent")
    taken = {"dtypes": (cache.dtype,), "device": cache.data.device}
    check_tensor("hidden", hidden, rank=2, **taken)
    check_tensor("weight", weight, shape=(cache.width, hidden.shape[1]), **taken)
    check_latent_arguments(hidden.shape[0], norm_weight, cos, sin, positions, slot_mapping, cache, rope, eps)
    data = cache.data
    if any_requires_grad((hidden, weight, norm_weight, cos, sin, data)):
        given = {"hidden": hidden, "weight": weight, "norm_weight": norm_weight, "cos": cos, "sin": sin, "cache": data}
        check_no_grad("compress_latent", **given)
    _compress_latent(
        hidden, weight, norm_weight, cos, sin, positions, slot_mapping, data, cache.layout_name, cache.latent_dim, rope,
        float(eps), wanted(batch_invariant),
    )  # fmt: skip
