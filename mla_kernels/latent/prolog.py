"""mla_prolog: all of a latent attention layer before the attention; norm_and_write: what of it is not a product.

From hidden states to absorbed, rotated queries and tokens in the cache takes four launches:

1. one product by both down-projections, ``[q_lora + latent + rope, hidden]`` (torch: the vendor's own; two launches if
   their weights lie apart);
2. ``norm_and_write``: the norm of the query's latent, and norm, rotation and cache write of the key's;
3. the product by the query's up-projection (torch);
4. ``absorb_query``: each head's product by W_UK beside its rotated rope part.

Each reads whole rows of what the one before has spread over all cores, hence a launch each. Fewer would be slower: 2
inside 1 keeps whole rows in one program, which leaves most cores idle in decode; 4 inside 3 would fetch W_UK again,
16 MB with 128 heads, for every tile of tokens. The products by plain weights are torch's, since that is what the
vendors' libraries do best. Without a query latent (DeepSeek-V2-Lite) there is no second norm, and the launches are four
as well: a product for the key, ``write_latent``, a product for the query, ``absorb_query``. After the attention
``expand_output`` is one launch and ``o_proj`` one more.
"""

from dataclasses import dataclass, field

import torch

from mla_kernels.checks import check_no_grad, check_tensor
from mla_kernels.cpu import prolog as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.absorb import check_power_of_two, launch_absorb
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.product import launch_linear
from mla_kernels.latent.write import (
    CACHE_ARGUMENTS,
    PLACE_ARGUMENTS,
    STRIDE_ARGUMENTS,
    WRITE_LATENT,
    cache_parts,
    cache_statics,
    check_cache,
    check_fits,
    check_latent_arguments,
    check_quantised_dtype,
    check_slots,
    launch_write,
    model_statics,
    store_token,
    token_is_written,
)
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit(do_not_specialize=["tokens"])
def norm_and_write_kernel(
    q_a, q_norm, q_latent,  # [tokens, Q], [Q], [tokens, Q]
    kv_a,  # [tokens, LATENT + ROPE]
    kv_norm,  # [LATENT]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    values, codes, scales, keys,  # the cache's parts, see cache_parts
    tokens, table_rows, num_slots, page_size,
    q_stride, kv_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    q_columns = tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, LATENT)
    q_scale = tl.load(q_norm + q_columns, mask=q_columns < Q, other=0.0).to(tl.float32)  # [BLOCK_Q]
    kv_scale = tl.load(kv_norm + columns).to(tl.float32)  # [LATENT]
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        q = tl.load(q_a + row * q_stride + q_columns, mask=q_columns < Q, other=0.0).to(tl.float32)  # [BLOCK_Q]
        q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) / Q + eps)) * q_scale
        tl.store(q_latent + row * Q + q_columns, q.to(q_latent.dtype.element_ty), mask=q_columns < Q)
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if token_is_written(slot, position, num_slots, table_rows):
            source = kv_a + row * kv_stride
            store_token(
                tl.load(source + columns).to(tl.float32),
                tl.load(source + LATENT + tl.arange(0, ROPE)).to(tl.float32),
                kv_scale, cos + position * cos_stride, sin + position * sin_stride,
                values, codes, scales, keys, slot, page_size, page_stride, slot_stride,
                eps, LATENT, ROPE, MODE, LAYOUT,
            )  # fmt: skip


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 4}
    check_quantised_dtype("norm_and_write", dtype, statics)
    check_fits("norm_and_write", chip, statics, _memory(chip, dtype, statics, tile))
    return tile


def _memory(chip, dtype, statics, tile):
    """Beside what a token's write takes, Ascend keeps the query's row and its scale, in fp32 and as they came."""
    need = WRITE_LATENT.memory(chip, dtype, statics, tile)
    if not chip.is_gpu:
        need["UB"] += 16 * statics["BLOCK_Q"]
    return need


def _cost(dtype, statics, sizes):
    write = WRITE_LATENT.cost(dtype, statics, sizes)
    q_bytes = (2 * sizes["tokens"] + 1) * statics["Q"] * DTYPE_BYTES[dtype]
    return Cost(flops=write.flops + sizes["tokens"] * 4 * statics["Q"], bytes=write.bytes + q_bytes)


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def _statics(q_rank: int, latent: dict[str, int | str]) -> dict[str, int | str]:
    return {"Q": q_rank, "BLOCK_Q": 1 << (q_rank - 1).bit_length(), **latent}


NORM_AND_WRITE = Kernel(
    norm_and_write_kernel,
    arguments={
        "q_a": "*T",
        "q_norm": "*T",
        "q_latent": "*T",
        "kv_a": "*T",
        "kv_norm": "*T",
        **PLACE_ARGUMENTS,
        **CACHE_ARGUMENTS,
        "tokens": "i32",
        "table_rows": "i32",
        "num_slots": "i32",
        "page_size": "i32",
        "q_stride": "i32:16",
        "kv_stride": "i32:16",
        **STRIDE_ARGUMENTS,
        "eps": "fp32",
    },
    statics=("Q", "BLOCK_Q", "LATENT", "ROPE", "MODE", "LAYOUT"),
    tiles={"num_warps": (1, 2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v3", _statics(1536, model_statics(512, 64, "interleaved_to_half")), {"tokens": 1024}),
        Case("minicpm3", _statics(768, model_statics(256, 32, "half")), {"tokens": 1024}),
        Case("v32_fp8", _statics(1536, model_statics(512, 64, "half", "fp8_v32")), {"tokens": 1024}, ("bf16",)),
        Case("glm_int8", _statics(2048, model_statics(512, 64, "interleaved", "int8")), {"tokens": 1024}, ("bf16",)),
    ),
    uses_dot=False,
)


def _launch_norm_and_write(
    q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps,
    batch_invariant=False,
):  # fmt: skip
    (tokens, q_rank), width, chip = q_a.shape, kv_a.shape[1], chip_of(q_a.device)
    q_latent = q_a.new_empty((tokens, q_rank))
    key = chip.device, q_a.dtype, tokens, q_rank, width, latent_dim, layout, rope, batch_invariant
    plan = NORM_AND_WRITE.kept.plans.get(key)
    if plan is None:
        statics = _statics(q_rank, cache_statics(layout, latent_dim, width - latent_dim, rope))
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens}
        tile = NORM_AND_WRITE.tile_for(chip, DTYPE_NAMES[q_a.dtype], statics, sizes)
        plan = NORM_AND_WRITE.keep(key, (statics, tile))
    if batch_invariant:
        q_a, kv_a = canonical(q_a), canonical(kv_a)
    pages, page_size, _ = cache.shape
    page_stride, slot_stride, _ = cache.stride()
    args = (
        q_a, q_norm, q_latent, kv_a, kv_norm, cos, sin, positions, slot_mapping,
        *cache_parts(cache, layout, latent_dim, cos), tokens, cos.shape[0], pages * page_size, page_size,
        q_a.stride()[0], kv_a.stride()[0], cos.stride()[0], sin.stride()[0], page_stride, slot_stride, eps,
    )  # fmt: skip
    NORM_AND_WRITE.launch(chip, tokens, args, *plan)
    return q_latent


def _launch_prolog(
    hidden, down, down_bias, q_norm, kv_norm, q_up, w_uk, cos, sin, positions, slot_mapping, cache, layout, latent_dim,
    rope, eps, batch_invariant=False,
):  # fmt: skip
    if batch_invariant:  # torch's products are not
        parts = [launch_linear(hidden, weight, bias) for weight, bias in zip(down, down_bias or [None] * len(down))]
    elif down_bias:
        parts = [torch.addmm(bias, hidden, weight.t()) for weight, bias in zip(down, down_bias)]
    else:
        parts = [torch.mm(hidden, down[0].t())]
        if len(down) == 2:
            parts.append(torch.mm(hidden, down[1].t()))
    places = (cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps, batch_invariant)
    if q_norm is None:
        launch_write(parts[0], kv_norm, *places)
        q_latent, source = hidden.new_empty(hidden.shape[0], 0), hidden
    else:
        q_a, kv_a = parts if len(parts) == 2 else parts[0].tensor_split((q_norm.shape[0],), 1)
        q_latent = source = _launch_norm_and_write(q_a, q_norm, kv_a, kv_norm, *places)
    heads = w_uk.shape[0]
    q = launch_linear(source, q_up) if batch_invariant else torch.mm(source, q_up.t())
    q = q.view(hidden.shape[0], heads, q_up.shape[0] // heads)
    return launch_absorb(q, w_uk, cos, sin, positions, rope, batch_invariant), q_latent


def _fake_prolog(
    hidden, down, down_bias, q_norm, kv_norm, q_up, w_uk, cos, sin, positions, slot_mapping, cache, layout, latent_dim,
    rope, eps, batch_invariant=False,
):  # fmt: skip
    tokens, (heads, nope, latent) = hidden.shape[0], w_uk.shape
    q_rank = 0 if q_norm is None else q_norm.shape[0]
    return hidden.new_empty(tokens, heads, latent + q_up.shape[0] // heads - nope), hidden.new_empty(tokens, q_rank)


_norm_and_write = define_op(
    "norm_and_write",
    "(Tensor q_a, Tensor q_norm, Tensor kv_a, Tensor kv_norm, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor slot_mapping, Tensor(a!) cache, str layout, int latent_dim, str rope, float eps=1e-06, "
    "bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.norm_and_write, 0, 2, 6, 7),
    device=_launch_norm_and_write,
    fake=lambda q_a, *rest: q_a.new_empty(q_a.shape),
    check_values=lambda q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, *rest: check_slots(
        positions, slot_mapping, cos, cache
    ),
)

_mla_prolog = define_op(
    "mla_prolog",
    "(Tensor hidden, Tensor[] down, Tensor[] down_bias, Tensor? q_norm, Tensor kv_norm, Tensor q_up, Tensor w_uk, "
    "Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, Tensor(a!) cache, str layout, int latent_dim, "
    "str rope, float eps=1e-06, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=by_row(cpu.mla_prolog, 0, 9, 10),
    device=_launch_prolog,
    fake=_fake_prolog,
    check_values=lambda *args: check_slots(args[9], args[10], args[7], args[11]),
)


@dataclass(frozen=True, eq=False)
class PrologWeights:
    """The weights of :func:`mla_prolog`, with their names in DeepSeek's checkpoints, taken as they lie.

    H hidden size, Q q_lora_rank, R latent_dim, D rope_dim, N nope_dim; all in one dtype on one device.

    Args:
        down: ``[Q + R + D, H]``, ``q_a_proj`` above ``kv_a_proj_with_mqa``: one product. Or the two as a pair. Without
            a query latent (Q = 0, DeepSeek-V2-Lite): ``kv_a_proj_with_mqa`` alone.
        kv_norm: ``[R]``, ``kv_a_layernorm``.
        q_up: ``[heads * (N + D), Q]``, ``q_b_proj``. Without a query latent ``q_proj``, ``[heads * (N + D), H]``.
        w_uk: ``[heads, N, R]``, ``kv_b_proj.weight.view(heads, N + v, R)[:, :N]``. R and D are powers of two from 16.
        q_norm: ``[Q]``, ``q_a_layernorm``; None without a query latent.
        down_bias: ``[Q + R + D]``, or a pair as ``down`` is, or None.

    Raises:
        TypeError: no tensor, or another dtype. ValueError: shapes or devices that do not go together.
    """

    down: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    kv_norm: torch.Tensor
    q_up: torch.Tensor
    w_uk: torch.Tensor
    q_norm: torch.Tensor | None = None
    down_bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None
    down_parts: tuple[torch.Tensor, ...] = field(init=False, repr=False)
    bias_parts: tuple[torch.Tensor, ...] = field(init=False, repr=False)
    hidden_size: int = field(init=False, repr=False)
    latent_dim: int = field(init=False, repr=False)
    q_rank: int = field(init=False, repr=False)
    rope_dim: int = field(init=False, repr=False)

    def _derive(self):
        """What follows from the weights, once."""
        down, bias = self.down, self.down_bias
        parts = tuple(down) if isinstance(down, (tuple, list)) else (down,)
        biases = () if bias is None else tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
        q_rank = 0 if self.q_norm is None else self.q_norm.shape[0]
        rope_dim = parts[-1].shape[0] - self.w_uk.shape[2] - (q_rank if len(parts) == 1 else 0)
        object.__setattr__(self, "down_parts", parts)
        object.__setattr__(self, "bias_parts", biases)
        object.__setattr__(self, "hidden_size", parts[-1].shape[-1])
        object.__setattr__(self, "latent_dim", self.w_uk.shape[2])
        object.__setattr__(self, "q_rank", q_rank)
        object.__setattr__(self, "rope_dim", rope_dim)

    def __post_init__(self):
        check_tensor("w_uk", self.w_uk, rank=3)
        heads, nope, latent = self.w_uk.shape
        like = self.w_uk
        check_power_of_two("w_uk's latent dimension", latent)
        check_tensor("kv_norm", self.kv_norm, shape=(latent,), like=like)
        if self.q_norm is not None:
            check_tensor("q_norm", self.q_norm, shape=(None,), like=like)
            if self.q_norm.shape[0] == 0:
                raise ValueError("q_norm: got 0 values, at least 1 or None is accepted")
        self._derive()
        parts = self.down_parts
        for part in parts:
            check_tensor("down", part, shape=(None, self.hidden_size), like=like)
        ranks = [self.q_rank] if len(parts) == 2 else []
        if len(parts) not in (1, 2) or (len(parts) == 2 and (not self.q_rank or parts[0].shape[0] != self.q_rank)):
            got = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"down: got {got}, [q_lora + latent + rope, hidden] or with q_norm the pair [q_lora, hidden] and "
                f"[latent + rope, hidden] is accepted; q_norm makes q_lora {self.q_rank}"
            )
        check_power_of_two("rope_dim (down's last rows less q_lora and the latent)", self.rope_dim)
        depth = self.q_rank or self.hidden_size
        check_tensor("q_up", self.q_up, shape=(heads * (nope + self.rope_dim), depth), like=like)
        if self.down_bias is not None:
            biases = self.bias_parts
            rows = [*ranks, latent + self.rope_dim + (0 if ranks else self.q_rank)]
            if len(biases) != len(rows):
                raise ValueError(f"down_bias: got {len(biases)} tensors, {len(rows)} are accepted, as down has")
            for bias, row in zip(biases, rows):
                check_tensor("down_bias", bias, shape=(row,), like=like)


def norm_and_write(
    q_a: torch.Tensor,
    q_norm: torch.Tensor,
    kv_a: torch.Tensor,
    kv_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LatentCache,
    *,
    rope: str,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Normalise the queries' latents, and normalise, rotate and write the keys' to their cache slots. One launch.

    Args:
        q_a: ``[tokens, q_lora]``, the output of ``q_a_proj``, in ``cache.dtype``. Rows may have any stride: ``q_a`` and
            ``kv_a`` may be columns of one product.
        q_norm: ``[q_lora]``, ``q_a_layernorm``, in ``cache.dtype``.
        kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, rope: as in ``write_latent``, ``kv_norm`` for its
            ``norm_weight``.
        eps: added to both mean squares.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        ``RMSNorm(q_a) * q_norm``, ``[tokens, q_lora]``, of every token, whatever its slot.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``write_latent``; nothing was written then.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2; Hugging Face ``DeepseekV3Attention.forward``.
    """
    check_cache(cache, "norm_and_write")
    check_tensor("kv_a", kv_a, shape=(None, cache.width), dtypes=(cache.dtype,), device=cache.data.device)
    check_tensor("q_a", q_a, shape=(kv_a.shape[0], None), like=kv_a)
    check_tensor("q_norm", q_norm, shape=(q_a.shape[1],), like=kv_a)
    if q_a.shape[1] == 0:
        raise ValueError(f"q_a: got shape {tuple(q_a.shape)}, at least one column is accepted")
    check_power_of_two("rope_dim", cache.rope_dim)
    check_latent_arguments(kv_a.shape[0], kv_norm, cos, sin, positions, slot_mapping, cache, rope, eps)
    if torch.is_grad_enabled():
        given = {"q_a": q_a, "q_norm": q_norm, "kv_a": kv_a, "kv_norm": kv_norm, "cos": cos, "sin": sin}
        check_no_grad("norm_and_write", **given, cache=cache.data)
    return _norm_and_write(
        q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache.data, cache.layout_name,
        cache.latent_dim, rope, float(eps), wanted(batch_invariant),
    )  # fmt: skip


def mla_prolog(
    hidden: torch.Tensor,
    weights: PrologWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LatentCache,
    *,
    rope: str,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states to what latent attention needs: absorbed queries, and the tokens written to the cache.

    Four launches, two of them torch's products (:mod:`mla_kernels.latent.prolog` says which and why).

    Args:
        hidden: ``[tokens, hidden_size]``, in ``cache.dtype``. Rows may have any stride.
        weights: :class:`PrologWeights`, in ``cache.dtype``.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them.
        positions: ``[tokens]`` int32 or int64, each token's row of the tables.
        slot_mapping: ``[tokens]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing (the token has a
            query all the same). All slots of a call other than -1 must differ.
        cache: the :class:`LatentCache` written to, in any layout. Slots that are not named keep their bits.
        rope: ``"interleaved_to_half"`` (DeepSeek-V3), ``"interleaved"`` (DeepSeek-V2) or ``"half"`` (MiniCPM3); see
            ``write_latent``.
        eps: added to the mean squares of both norms.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says. On devices the products are then this library's, in one tile for
            every number of tokens, and not torch's.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing, and
    its query is rotated by the nearest row of the tables.

    Returns:
        (q ``[tokens, heads, latent_dim + rope_dim]`` ready for ``mla_decode``, the normalised query latent
        ``[tokens, q_lora]`` that DeepSeek-V3.2's indexer starts from; q_lora is 0 where there is none).

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` or ``weights`` is of another class.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or the widths do not fit the chip.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2, appendix C; Hugging Face
    ``DeepseekV3Attention.forward``.
    """
    check_cache(cache, "mla_prolog")
    if not isinstance(weights, PrologWeights):
        raise TypeError(f"weights: got {type(weights).__name__}, PrologWeights is accepted")
    check_tensor("weights", weights.kv_norm, shape=(cache.latent_dim,), dtypes=(cache.dtype,), device=cache.data.device)
    if weights.rope_dim != cache.rope_dim:
        raise ValueError(f"weights: got rope_dim {weights.rope_dim}, the cache's is {cache.rope_dim}")
    check_tensor("hidden", hidden, shape=(None, weights.hidden_size), like=weights.kv_norm)
    check_latent_arguments(hidden.shape[0], weights.kv_norm, cos, sin, positions, slot_mapping, cache, rope, eps)
    parts, biases = weights.down_parts, weights.bias_parts
    if torch.is_grad_enabled():
        named = {f"weights.{name}": getattr(weights, name) for name in ("kv_norm", "q_up", "w_uk", "q_norm")}
        named |= {f"weights.down[{i}]": part for i, part in enumerate(parts)}
        named |= {f"weights.down_bias[{i}]": bias for i, bias in enumerate(biases)}
        check_no_grad("mla_prolog", hidden=hidden, **named, cos=cos, sin=sin, cache=cache.data)
    return _mla_prolog(
        hidden, parts, biases, weights.q_norm, weights.kv_norm, weights.q_up, weights.w_uk, cos, sin, positions,
        slot_mapping, cache.data, cache.layout_name, cache.latent_dim, rope, float(eps), wanted(batch_invariant),
    )  # fmt: skip
