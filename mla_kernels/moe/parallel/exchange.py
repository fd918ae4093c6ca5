"""The exchanges of ExpertParallel and their gradients: rows on their way from tokens to experts, and back.

Symbols: R ranks, T tokens of this rank in a chunk, K slots of a token, N rows that came to this rank, H hidden size.

An exchange is two autograd functions, one that begins it and one that waits for it, so that others and the experts run
in between. In the backward pass each of them does the other's work for the gradients::

    forward            leave          arrive   experts   give_back        receive
                       start -------- wait               start ---------- wait
    backward           wait --------- start              wait ----------- start

Autograd runs backwards in the order in which the forward pass was recorded, on every rank. All that a pass keeps is
what the experts save, where saved-tensor hooks see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mla_kernels.invariance import wanted
from mla_kernels.moe.parallel.agreement import Agreement


@dataclass
class Chunk:
    """A run of this rank's tokens, and the rows that they become: one for each rank that has an expert of a token."""

    token: torch.Tensor  # [rows sent] the token, counted within the chunk
    ids: torch.Tensor  # [rows sent, K] counted among the receiver's experts, -1 for experts of other ranks
    slots: torch.Tensor  # [T, min(K, R)] a token's rows, by rank; the number of rows sent where there is none
    slot_rows: torch.Tensor  # [T, K] the row that holds a slot's expert; the number of rows sent for none
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank


class Way:
    """One way of a chunk's rows, and of their gradients in the opposite direction; at most one exchange at a time."""

    def __init__(self, agreement: Agreement, sent: list[int], received: list[int], what: str):
        self.agreement, self.sent, self.received, self.what = agreement, sent, received, what
        self.call = agreement.call
        self._flying = None

    def start(self, buffer: torch.Tensor, reverse: bool = False) -> None:
        """Begin to exchange rows of bytes. One more row follows those that come, for tokens that have none to name."""
        sent, received = (self.received, self.sent) if reverse else (self.sent, self.received)
        arriving = buffer.new_empty(sum(received) + 1, buffer.shape[1])
        handle = dist.all_to_all_single(arriving[:-1], buffer, received, sent, self.agreement.group, async_op=True)
        self._flying = handle, arriving, buffer

    def finish(self) -> torch.Tensor:
        (handle, arriving, _), self._flying = self._flying, None
        self.agreement.wait(handle, self.what, arriving.device)
        return arriving

    def backward(self):
        """What runs inside belongs to the backward pass of this way's call."""
        return self.agreement.reported(f"{self.call}, backward")


def exchange(
    agreement: Agreement,
    plan: list[tuple[slice, Chunk]],
    compute: Callable,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    parameters: tuple,
    *,
    experts: int,
    gradients: bool,
) -> torch.Tensor:
    """[T, H]: every token to its experts' ranks and their sums back, chunk by chunk. While the experts work on one, the
    next one arrives and the last one returns. ``experts`` is how many this rank has; see ``ExpertParallel.run``."""
    lengths = [tokens.stop - tokens.start for tokens, _ in plan]
    parts = zip(hidden.split(lengths), weights.split(lengths))
    there = [Way(agreement, c.sent, c.received, "tokens on their way to their experts") for _, c in plan]
    back = [Way(agreement, c.received, c.sent, "tokens on their way back") for _, c in plan]
    # with it every rank records every exchange, whichever of its own tensors need gradients
    anchor = torch.empty(0, device=hidden.device, requires_grad=gradients)
    idle = not experts or not any(sum(chunk.received) for _, chunk in plan)
    leaving, returning = [], []

    def leave():
        if len(leaving) < len(plan):
            chunk, way = plan[len(leaving)][1], there[len(leaving)]
            leaving.append(_Leave.apply(way, chunk, *next(parts), anchor))

    leave()
    for number in range(len(plan)):
        leave()
        arguments = there[number], hidden.shape[1], hidden.dtype, weights.shape[1], leaving[number]
        rows, row_weights, ids, link = _Arrive.apply(*arguments)
        if idle:  # what then goes back is not looked at
            out = _NoWork.apply(rows, *(() if number else parameters))
        elif len(rows):
            out = _checked(compute(rows, row_weights, ids, *parameters), rows)
        else:
            out = rows
        returning.append(_GiveBack.apply(back[number], out, link))
    outs = [_Receive.apply(way, chunk, hidden.dtype, ticket) for way, (_, chunk), ticket in zip(back, plan, returning)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Leave(torch.autograd.Function):
    """Begin the way of a chunk's tokens to their experts. Gives a ticket, by which autograd knows the exchange."""

    @staticmethod
    def forward(ctx, way, chunk, hidden, weights, anchor):
        ctx.way, ctx.chunk, ctx.row = way, chunk, (hidden.shape[1], hidden.dtype)
        buffer, (rows, row_weights, ids) = _buffer(sum(chunk.sent), hidden, *_parts(hidden, weights.shape[1]))
        _gather(hidden, chunk.token, rows)
        _gather(weights, chunk.token, row_weights)
        ids.copy_(chunk.ids)
        way.start(buffer)
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        chunk, top_k = ctx.chunk, ctx.chunk.ids.shape[1]
        with ctx.way.backward():
            rows, row_weights = _views(ctx.way.finish(), ctx.row, (top_k, torch.float32))
            hidden_grad = weights_grad = None
            if ctx.needs_input_grad[2]:
                hidden_grad = _sum(rows, chunk.slots)
            if ctx.needs_input_grad[3]:
                picked = row_weights[chunk.slot_rows, torch.arange(top_k, device=rows.device)]
                weights_grad = picked.masked_fill(chunk.slot_rows == len(rows) - 1, 0.0)
        return None, None, hidden_grad, weights_grad, None


class _Arrive(torch.autograd.Function):
    """Wait for what came to this rank: rows [N, H], weights [N, K], ids [N, K], and a link to :class:`_GiveBack`, by
    which gradients of rows are sent though the experts used none."""

    @staticmethod
    def forward(ctx, way, width, dtype, top_k, ticket):
        ctx.way = way
        buffer = way.finish()[:-1]
        rows, weights, ids = _views(buffer, (width, dtype), (top_k, torch.float32), (top_k, torch.int32))
        ids = ids.contiguous()
        ctx.mark_non_differentiable(ids)
        return rows, weights.contiguous(), ids, ticket.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, rows_grad, weights_grad, _ids_grad, link_grad):
        with ctx.way.backward():
            parts = (rows_grad.shape[1], rows_grad.dtype), (weights_grad.shape[1], torch.float32)
            buffer, (rows, weights) = _buffer(len(rows_grad), rows_grad, *parts)
            rows.copy_(rows_grad)
            weights.copy_(weights_grad)
            ctx.way.start(buffer, reverse=True)
        return None, None, None, None, link_grad


class _NoWork(torch.autograd.Function):
    """Rows as they came, on a rank whose experts have nothing to do; gradients of its parameters are 0."""

    @staticmethod
    def forward(ctx, rows, *parameters):
        ctx.like = [None if x is None else (x.shape, x.dtype, x.device) for x in parameters]
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        zeros = (
            torch.zeros(like[0], dtype=like[1], device=like[2]) if needed else None
            for like, needed in zip(ctx.like, ctx.needs_input_grad[1:])
        )
        return grad, *zeros


class _GiveBack(torch.autograd.Function):
    """Begin the way of the experts' results back. Gives a ticket."""

    @staticmethod
    def forward(ctx, way, out, link):
        ctx.way, ctx.out = way, (out.shape[1], out.dtype)
        way.start(out.contiguous().view(torch.uint8))
        return link.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket_grad):
        with ctx.way.backward():
            (grad,) = _views(ctx.way.finish()[:-1], ctx.out)
        return None, grad, ticket_grad


class _Receive(torch.autograd.Function):
    """Wait for the results of a chunk's tokens and add them up.

    Its saved tensor, of nothing, is the first one that a backward pass asks for: under a checkpoint the forward pass
    then runs again here, on every rank, with all its exchanges, before the backward pass begins its own.
    """

    @staticmethod
    def forward(ctx, way, chunk, dtype, ticket):
        ctx.way, ctx.chunk = way, chunk
        ctx.save_for_backward(ticket.new_empty(0))
        return _sum(way.finish().view(dtype), chunk.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ticket_grad,) = ctx.saved_tensors
        chunk = ctx.chunk
        with ctx.way.backward():
            buffer, (rows,) = _buffer(sum(chunk.sent), grad, (grad.shape[1], grad.dtype))
            _gather(grad, chunk.token, rows)
            ctx.way.start(buffer, reverse=True)
        return None, None, None, ticket_grad


def _parts(hidden, top_k):
    """(columns, dtype) of what stands in a row of bytes: a token, its weights and its ids."""
    return (hidden.shape[1], hidden.dtype), (top_k, torch.float32), (top_k, torch.int32)


def _buffer(rows, like, *parts):
    """[rows, bytes] on ``like``'s device and, for parts of (columns, dtype), the views into it."""
    buffer = torch.empty(rows, _ends(parts)[-1], dtype=torch.uint8, device=like.device)
    return buffer, _views(buffer, *parts)


def _views(buffer, *parts):
    starts = [0, *_ends(parts)]
    return [
        buffer.view(dtype)[:, start // dtype.itemsize :][:, :columns] for start, (columns, dtype) in zip(starts, parts)
    ]


def _ends(parts):
    """Where each part ends in a row of bytes; each begins at a multiple of 64, as the kernels' loads like it."""
    return list(accumulate(-(-columns * dtype.itemsize // 64) * 64 for columns, dtype in parts))


def _checked(out, rows):
    """compute's result, refused here where the other ranks could not make sense of its bytes."""
    wanted = tuple(rows.shape), rows.dtype, rows.device
    got = (tuple(out.shape), out.dtype, out.device) if isinstance(out, torch.Tensor) else type(out).__name__
    if got != wanted:
        raise ValueError(f"compute: its result was {got}, {wanted} is accepted (its rows' shape, dtype and device)")
    return out


def _gather(values, index, out):
    """``values[index]`` into ``out``; an empty chunk gives zeros, which a capacity makes it send and nobody uses."""
    if len(values):
        torch.index_select(values, 0, index, out=out)
    else:
        out.zero_()


def _sum(rows, slots):
    """[tokens, H]: the sum of each token's rows in fp32, in the order of its slots. The last row is nobody's."""
    filled = slots.new_full((2,), len(rows) - 1, dtype=torch.int32)
    ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
    return torch.ops.mla_kernels.combine(rows, ones, slots.int().flatten(), filled, wanted(None))
