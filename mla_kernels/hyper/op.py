"""hyper_pre, hyper_post, hyper_post_pre and hyper_head: the public functions, their checks and their ops.

Symbols: T tokens, N streams, H hidden size, M rows of fn.
"""

import torch

from mla_kernels.checks import check_choice, check_int, check_tensor
from mla_kernels.cpu import hyper as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.hyper.backward import launch_pre_backward
from mla_kernels.hyper.finish import empty_results, launch_finish
from mla_kernels.hyper.form import MOST_STREAMS, OP_ARGUMENTS, SINKHORN, HyperForm, StreamMix
from mla_kernels.hyper.post_backward import launch_post_backward
from mla_kernels.hyper.project import launch_project
from mla_kernels.invariance import canonical, wanted
from mla_kernels.shim import define_op

_FP32 = (torch.float32,)
KINDS = {"sigmoid": "head", "mean": "mean"}
"""How a head collapses -> the kernels' name of it."""


def _launch_pre(streams, fn, base, scale, norm_weight, kind, iterations, eps, norm_eps, magnitude, alone):
    streams = canonical(streams) if alone else streams
    return launch_finish(
        launch_project(streams, fn)[1], base, scale, streams, norm_weight, kind, iterations, eps, norm_eps, magnitude
    )


def _fake_pre(streams, fn, base, scale, norm_weight, kind, *_):
    return empty_results(streams, kind)


def _launch_head(streams, fn, base, scale, norm_weight, collapse, eps, norm_eps, alone):
    streams = canonical(streams) if alone else streams
    partial = None if collapse == "mean" else launch_project(streams, fn)[1]
    return launch_finish(partial, base, scale, streams, norm_weight, KINDS[collapse], 1, eps, norm_eps, 0.0)[0]


def _cpu_head(streams, fn, base, scale, norm_weight, collapse, eps, norm_eps):
    return cpu.hyper_pre(streams, fn, base, scale, norm_weight, KINDS[collapse], 1, eps, norm_eps, 0.0)[0]


def _fake_head(streams, *_):
    tokens, _, hidden = streams.shape
    return streams.new_empty(tokens, hidden)


def _launch_post(streams, out, post, comb, alone):
    if alone:
        streams, out = canonical(streams), canonical(out)
    return launch_project(streams, None, out, post, comb)[0]


def _launch_post_pre(streams, out, post, comb, fn, base, scale, norm_weight, *form):
    *form, alone = form
    if alone:
        streams, out = canonical(streams), canonical(out)
    new, partial = launch_project(streams, fn, out, post, comb)
    return new, *launch_finish(partial, base, scale, new, norm_weight, *form)


def _fake_post(streams, *_):
    return streams.new_empty(streams.shape)


def _fake_post_pre(streams, out, post, comb, fn, base, scale, norm_weight, kind, *_):
    return streams.new_empty(streams.shape), *empty_results(streams, kind)


def _refuse(ctx, *grads):
    raise NotImplementedError("hyper-connections have no second derivative")


_NO_SECOND = (lambda ctx, inputs, output: None, _refuse)


def _fake_pre_backward(collapsed_grad, post_grad, comb_grad, streams, fn, base, scale, norm_weight, *_):
    def like(tensor):
        return streams.new_empty(0, dtype=torch.float32) if tensor is None else tensor.new_empty(tensor.shape)

    return streams.new_empty(streams.shape), like(fn), like(base), like(scale), like(norm_weight)


def _fake_post_backward(grad, streams, out, post, comb):
    return (
        streams.new_empty(streams.shape),
        out.new_empty(out.shape),
        post.new_empty(post.shape),
        streams.new_empty(0, dtype=torch.float32) if comb is None else comb.new_empty(comb.shape),
    )


_pre_backward = define_op(
    "hyper_pre_backward",
    "(Tensor collapsed_grad, Tensor post_grad, Tensor comb_grad, Tensor streams, Tensor? fn, Tensor? base, "
    f"Tensor? scale, Tensor? norm_weight, {OP_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.hyper_pre_backward,
    device=launch_pre_backward,
    fake=_fake_pre_backward,
    autograd=_NO_SECOND,
)

_post_backward = define_op(
    "hyper_post_backward",
    "(Tensor grad, Tensor streams, Tensor out, Tensor post, Tensor? comb) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.hyper_post_backward,
    device=launch_post_backward,
    fake=_fake_post_backward,
    autograd=_NO_SECOND,
)


def _save_pre(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.form = inputs[5:-1]


def _pre_gradients(grads, inputs, form):
    """Of the op's tensors, None for those that are None."""
    found = _pre_backward(*grads, *inputs, *form)
    return [None if tensor is None else grad for tensor, grad in zip(inputs, found)]


def _backward_pre(ctx, *grads):
    return *_pre_gradients(grads, ctx.saved_tensors, ctx.form), *(None,) * 6


def _save_post(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _backward_post(ctx, grad):
    inputs = ctx.saved_tensors
    *found, comb_grad = _post_backward(grad, *inputs)
    return *found, None if inputs[3] is None else comb_grad, None


def _save_post_pre(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], output[0])
    ctx.form = inputs[8:-1]


def _backward_post_pre(ctx, new_grad, *grads):
    *inputs, new = ctx.saved_tensors
    through, *weights = _pre_gradients(grads, (new, *inputs[4:]), ctx.form)
    *found, comb_grad = _post_backward(new_grad + through, *inputs[:4])
    return *found, None if inputs[3] is None else comb_grad, *weights, *(None,) * 6


def _save_head(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    collapse, eps, norm_eps, _ = inputs[5:]
    ctx.form = KINDS[collapse], 1, eps, norm_eps, 0.0


def _backward_head(ctx, grad):
    nothing = grad.new_empty(0, dtype=torch.float32)
    return *_pre_gradients((grad, nothing, nothing), ctx.saved_tensors, ctx.form), *(None,) * 4


_pre = define_op(
    "hyper_pre",
    f"(Tensor streams, Tensor fn, Tensor base, Tensor scale, Tensor? norm_weight, {OP_ARGUMENTS}, "
    "bool batch_invariant=False) -> (Tensor, Tensor, Tensor)",
    cpu=by_row(cpu.hyper_pre, 0),
    device=_launch_pre,
    fake=_fake_pre,
    autograd=(_save_pre, _backward_pre),
)

_post = define_op(
    "hyper_post",
    "(Tensor streams, Tensor out, Tensor post, Tensor? comb=None, bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.hyper_post, 0, 1, 2, 3),
    device=_launch_post,
    fake=_fake_post,
    autograd=(_save_post, _backward_post),
)

_post_pre = define_op(
    "hyper_post_pre",
    "(Tensor streams, Tensor out, Tensor post, Tensor? comb, Tensor fn, Tensor base, Tensor scale, "
    f"Tensor? norm_weight, {OP_ARGUMENTS}, bool batch_invariant=False) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=by_row(cpu.hyper_post_pre, 0, 1, 2, 3),
    device=_launch_post_pre,
    fake=_fake_post_pre,
    autograd=(_save_post_pre, _backward_post_pre),
)

_head = define_op(
    "hyper_head",
    "(Tensor streams, Tensor? fn, Tensor? base, Tensor? scale, Tensor? norm_weight, str collapse, float eps, "
    "float norm_eps, bool batch_invariant=False) -> Tensor",
    cpu=by_row(_cpu_head, 0),
    device=_launch_head,
    fake=_fake_head,
    autograd=(_save_head, _backward_head),
)


def _check_streams(streams) -> tuple[int, int, int]:
    check_tensor("streams", streams, rank=3)
    tokens, count, hidden = streams.shape
    if not 1 <= count <= MOST_STREAMS:
        check_int("number of streams (streams.shape[1])", count, 1, MOST_STREAMS)
    if hidden < 1:
        check_int("hidden size (streams.shape[2])", hidden, 1)
    return tokens, count, hidden


def _check_weights(streams, fn, base, scale, norm_weight, rows, scales) -> None:
    count, hidden = streams.shape[1:]
    device = streams.device
    check_tensor("fn", fn, shape=(rows, count * hidden), dtypes=_FP32, device=device)
    check_tensor("base", base, shape=(rows,), dtypes=_FP32, device=device)
    check_tensor("scale", scale, shape=(scales,), dtypes=_FP32, device=device)
    if not fn.is_contiguous():
        raise ValueError(f"fn: got strides {tuple(fn.stride())}, contiguous rows without gaps are accepted")
    _check_norm(streams, norm_weight)


def _check_norm(streams, norm_weight) -> None:
    if norm_weight is not None:
        dtypes = (streams.dtype, torch.float32)
        check_tensor("norm_weight", norm_weight, shape=(streams.shape[2],), dtypes=dtypes, device=streams.device)


def _check_written(streams, out, post, comb) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checks what a layer's result is written back with; post and comb without gaps."""
    tokens, count, hidden = streams.shape
    check_tensor("out", out, shape=(tokens, hidden), like=streams)
    check_tensor("post", post, shape=(tokens, count), dtypes=_FP32, device=streams.device, dense=False)
    if comb is not None:
        shape = (tokens, count, count)
        check_tensor("comb", comb, shape=shape, dtypes=_FP32, device=streams.device, dense=False)
        comb = comb.contiguous()
    return post.contiguous(), comb


def _check_form(form) -> None:
    if not isinstance(form, HyperForm):
        raise TypeError(f"form: got {type(form).__name__}, a HyperForm is accepted")


def hyper_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    form: HyperForm = SINKHORN,
    norm_weight: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a layer reads of a token's residual streams, and the weights that its result is written back with.

    With l = RMSNorm(streams) fn^T, each part of it times its scale, plus its base, in fp32::

        pre = sigmoid(l_pre) + eps                collapsed = sum_n pre_n streams_n
        post = magnitude sigmoid(l_post)          + eps with mix "identity"
        comb = sinkhorn(softmax(l_comb) + eps)    with mix "sinkhorn": columns, then iterations - 1 times rows and
                                                  columns, are divided by their sum + eps

    Two launches: products and sums of squares over cuts of H, and the rest. Differentiable in all tensors; the backward
    stores nothing but inputs and computes the iterations again. Bits do not depend on the batch on devices, with
    contiguous streams whose rows are multiples of 16 bytes or ``batch_invariant``.

    Args:
        streams: [T, N, H] bf16, fp16 or fp32, rows dense, any strides between them. N is 1 to 4, H on devices at most
            16,384 (8,192 on Ascend).
        fn: [M, N H] fp32, contiguous. M is (2 + N) N, rows of pre, post and comb[0, 0], comb[0, 1] ...; 2 N with
            mix "identity".
        base: [M] fp32.
        scale: [3] fp32, of pre, post and comb; [2] with mix "identity".
        form: the model's constants, :class:`HyperForm`.
        norm_weight: [H], fp32 or the streams' dtype: the weight of the layer's own norm. Collapsed is then
            RMSNorm(collapsed) norm_weight, of the sum before it is rounded.
        batch_invariant: whether bits must not depend on the batch; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        (collapsed [T, H] in the streams' dtype, post [T, N] fp32, comb [T, N, N] fp32 or None with mix "identity").

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank, shape or device. NotImplementedError: H does not fit the chip.

    Source: mHC, arXiv 2512.24880; Hugging Face ``DeepseekV4HyperConnection``, ``HYV4HyperConnection``,
    ``Glm5NextTextHyperConnection``.
    """
    _, count, _ = _check_streams(streams)
    _check_form(form)
    _check_weights(streams, fn, base, scale, norm_weight, form.rows(count), form.scales)
    collapsed, post, comb = _pre(streams, fn, base, scale, norm_weight, *form.arguments, wanted(batch_invariant))
    return collapsed, post, comb if form.mix is StreamMix.SINKHORN else None


def hyper_post(
    streams: torch.Tensor,
    out: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor | None = None,
    *,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """The residual streams behind a layer: stream n is ``post_n out + sum_j comb[j, n] streams_j``.

    comb is read along its columns, ``comb.T @ streams``: with ``comb = [[0, 1], [0, 0]]`` the second stream is the old
    first, and the first is nothing but the layer's. Without comb the streams stay: ``post_n out + streams_n``. In fp32,
    rounded once. One launch. Differentiable in all tensors.

    Args:
        streams: [T, N, H] bf16, fp16 or fp32, rows dense.
        out: [T, H] in that dtype, what the layer gave.
        post: [T, N] fp32.
        comb: [T, N, N] fp32, or None (HY-V4).
        batch_invariant: as of :func:`hyper_pre`.

    Returns:
        [T, N, H], new.

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank, shape or device.

    Source: Hugging Face ``DeepseekV4DecoderLayer`` and ``HYV4DecoderLayer``. The former rounds post and comb to the
    streams' dtype first.
    """
    _check_streams(streams)
    post, comb = _check_written(streams, out, post, comb)
    return _post(streams, out, post, comb, wanted(batch_invariant))


def hyper_post_pre(
    streams: torch.Tensor,
    out: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    form: HyperForm = SINKHORN,
    norm_weight: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """From one layer to the next: :func:`hyper_post` of the one, then :func:`hyper_pre` of the other.

    Two launches: the new streams are multiplied by fn before they leave the chip. Differentiable in all tensors.

    Args:
        streams, out, post, comb: as :func:`hyper_post` takes them. comb is None with mix "identity", and only there.
        fn, base, scale, form, norm_weight, batch_invariant: as :func:`hyper_pre` takes them, of the next layer.

    Returns:
        (new streams [T, N, H], collapsed [T, H], post [T, N], comb [T, N, N] or None).

    Raises:
        TypeError, ValueError, NotImplementedError: as of these two.
    """
    _, count, _ = _check_streams(streams)
    _check_form(form)
    sinkhorn = form.mix is StreamMix.SINKHORN
    if (comb is not None) != sinkhorn:
        accepted = "a tensor" if sinkhorn else "None"
        raise ValueError(f"comb: got {type(comb).__name__} with mix {form.mix.value!r}, {accepted} is accepted there")
    post, comb = _check_written(streams, out, post, comb)
    _check_weights(streams, fn, base, scale, norm_weight, form.rows(count), form.scales)
    new, collapsed, post, comb = _post_pre(
        streams, out, post, comb, fn, base, scale, norm_weight, *form.arguments, wanted(batch_invariant)
    )  # fmt: skip
    return new, collapsed, post, comb if sinkhorn else None


def hyper_head(
    streams: torch.Tensor,
    fn: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    collapse: str = "sigmoid",
    form: HyperForm = SINKHORN,
    norm_weight: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """The residual streams behind the last layer as one row.

    ``collapse="sigmoid"`` (DeepSeek-V4, HY-V4): ``sum_n pre_n streams_n`` with pre as of :func:`hyper_pre`, in two
    launches. ``collapse="mean"`` (GLM-5-next): their mean, without fn, base and scale, in one. Differentiable in all
    tensors.

    Args:
        streams: [T, N, H] bf16, fp16 or fp32, as :func:`hyper_pre` takes them.
        fn, base, scale: [N, N H], [N] and [1] fp32; None with "mean", and only there.
        collapse: "sigmoid" or "mean".
        form: of it eps and norm_eps are used.
        norm_weight: [H], as of :func:`hyper_pre`: the weight of the model's last norm.
        batch_invariant: as of :func:`hyper_pre`.

    Returns:
        [T, H] in the streams' dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`hyper_pre`, and weights with "mean".

    Source: Hugging Face ``DeepseekV4HyperHead``, ``HYV4HyperHead``, ``Glm5NextTextHyperHead``.
    """
    _, count, _ = _check_streams(streams)
    _check_form(form)
    check_choice("collapse", collapse, tuple(KINDS))
    if collapse == "mean":
        for name, value in (("fn", fn), ("base", base), ("scale", scale)):
            if value is not None:
                raise ValueError(f"{name}: got {type(value).__name__} with collapse 'mean', None is accepted there")
        _check_norm(streams, norm_weight)
    else:
        _check_weights(streams, fn, base, scale, norm_weight, count, 1)
    invariant = wanted(batch_invariant)
    return _head(streams, fn, base, scale, norm_weight, collapse, form.eps, form.norm_eps, invariant)
