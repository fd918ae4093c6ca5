"""ExpertParallel: the experts of a layer spread over the ranks of a process group.

Symbols: R ranks, E experts in all, T tokens of this rank, K slots of a token, H hidden size, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

from mla_kernels import invariance
from mla_kernels.checks import FLOATS, check_int, check_tensor
from mla_kernels.invariance import wanted
from mla_kernels.moe.experts.activation import SWIGLU, Activation
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.parallel.agreement import MAX_CHUNKS, Agreement
from mla_kernels.moe.parallel.exchange import Chunk, exchange


class ExpertParallel:
    """Who owns which experts, and the exchange of tokens between the owners, for one group of ranks.

    Rank r owns a run of neighbouring experts. A token travels once to every rank that owns one of its experts, together
    with its ids and weights there; ids of experts elsewhere become -1, which :func:`mla_kernels.fused_moe` skips. The
    rank sums its experts' outputs and sends one row back, and the token's own rank adds these rows, in the order of the
    ranks, in fp32. Every exchange is one ``all_to_all_single`` of bytes, so NCCL, HCCL and gloo all serve.

    With 4 experts on 2 ranks and top_k 2: token 0 with experts (0, 1) is sent to rank 0 only, with ids (0, 1); token 1
    with experts (3, 0) to rank 0 with ids (-1, 0) and to rank 1 with ids (1, -1).

    Results compared with one process: a token whose experts all live on one rank gets the same bits. Otherwise the sum
    over slots becomes a sum of one partial sum a rank: another order in fp32, and in bf16 and fp16 one more rounding
    for each of these ranks. Every run gives the same bits; the number of chunks and other tokens may change the
    rounding of sums, since the experts' tiles follow the number of rows.

    Host waits: ``all_to_all_single`` needs its split sizes on the host, so :meth:`run` waits once for the device, after
    an exchange of counts, however many chunks there are. With ``capacity`` it never waits, and all shapes are fixed, as
    the capture of a graph asks: every pair of ranks then exchanges ``capacity`` rows whatever the routing, most of them
    unused.

    Args:
        num_experts: experts of the layer, over all ranks.
        group: a process group of torch.distributed, None for the default one.
        experts_per_rank: how many experts each rank owns, 0 allowed; None divides them evenly, the first ranks taking
            one more where that leaves a remainder.
        capacity: the most tokens that a rank may bring to a call, or None. It bounds the rows between two ranks, so
            nothing is ever dropped. Sizes are then compared at the first call of a kind only, which must not be
            captured.
        timeout: seconds to wait for the other ranks. On CPU tensors this holds for every exchange. On devices it holds
            for the exchange of counts, and the group's own time-out for the rest.

    Raises:
        ValueError: counts that do not add up, a process that is not in the group. RuntimeError: no process group.
    """

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        *,
        experts_per_rank: Sequence[int] | None = None,
        capacity: int | None = None,
        timeout: float = 300.0,
    ):
        check_int("num_experts", num_experts, 1)
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ExpertParallel needs a process group: call torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        if experts_per_rank is None:
            experts_per_rank = [num_experts // self.size + (r < num_experts % self.size) for r in range(self.size)]
        self.experts_per_rank = tuple(experts_per_rank)
        for count in self.experts_per_rank:
            check_int("experts_per_rank", count, 0)
        if len(self.experts_per_rank) != self.size or sum(self.experts_per_rank) != num_experts:
            raise ValueError(
                f"experts_per_rank: got {self.experts_per_rank}, {self.size} counts with the sum {num_experts} "
                "are accepted"
            )
        if capacity is not None:
            check_int("capacity", capacity, 1)
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, seconds above 0 are accepted")
        self.num_experts, self.capacity, self.timeout = num_experts, capacity, float(timeout)
        self._first = [0, *accumulate(self.experts_per_rank)]
        self._agreement = Agreement(self.group, self.timeout)
        self._on_device: dict[torch.device, tuple] = {}
        self._known: set[tuple] = set()  # sizes that the ranks agreed on, with capacity

    @property
    def num_local(self) -> int:
        """How many experts this rank owns."""
        return self.experts_per_rank[self.rank]

    @property
    def local(self) -> slice:
        """The experts of this rank: ``gate_up[parallel.local]`` of all experts' weights are its own."""
        return slice(self._first[self.rank], self._first[self.rank + 1])

    def fused_moe(
        self,
        hidden: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        *,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        activation: Activation = SWIGLU,
        weight_at: str = "output",
        chunks: int = 1,
        batch_invariant: bool | None = None,
    ) -> torch.Tensor:
        """:func:`mla_kernels.fused_moe` of this rank's tokens, with the experts of all ranks.

        Every rank of the group calls it, ranks without tokens too, and every rank runs the backward if one does, alike:
        for gradients of the same tensors, under a checkpoint or not, once or, with the graph retained, again.
        Differentiable in the same tensors; gradients of the experts are sums over all ranks' tokens, chunk after chunk
        in the weights' dtype.

        Args:
            hidden: [T, H]; T may differ between ranks, and be 0.
            gate_up, down, gate_up_bias, down_bias: those of this rank's experts, [num_local, ...].
            weights: [T, K] fp32.
            ids: [T, K] int32 of 0 .. num_experts - 1; others are skipped.
            activation, weight_at: as there.
            chunks: 1 to 16, the same on every rank. The tokens are cut into so many runs, and the experts work on one
                while the next is on its way here and the last one on its way back.
            batch_invariant: as there; the experts' ranks stay part of what a token's bits follow from.

        Returns:
            [T, H] in hidden's dtype.

        Raises:
            ValueError, TypeError: a wrong argument, here or on another rank (then with its number), or ranks that
            disagree on sizes; on every rank. TimeoutError, RuntimeError: a rank did not come or failed, with the cause
            that it gave; what fails in its experts' own backward is not told, and the others wait for their time-out.
        """
        invariant = wanted(batch_invariant)
        options = {"activation": activation, "weight_at": weight_at, "batch_invariant": invariant}

        def check():
            for name, weight in (("gate_up", gate_up), ("down", down)):
                if not isinstance(weight, torch.Tensor):
                    raise TypeError(f"{name}: got {type(weight).__name__}, a torch.Tensor is accepted")
                if weight.dim() != 3 or weight.shape[0] != self.num_local:
                    raise ValueError(
                        f"{name}: got shape {tuple(weight.shape)}, ({self.num_local}, any, any) is accepted (one for "
                        f"each expert of rank {self.rank})"
                    )

        def compute(rows, row_weights, row_ids, gate_up, down, gate_up_bias, down_bias):
            return fused_moe(
                rows, gate_up, down, row_weights, row_ids, gate_up_bias=gate_up_bias, down_bias=down_bias, **options
            )

        parameters = (gate_up, down, gate_up_bias, down_bias)
        with invariance.batch_invariant(invariant):  # for the sum over ranks
            return self.run(compute, hidden, weights, ids, parameters=parameters, chunks=chunks, check=check)

    def run(
        self,
        compute: Callable,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        *,
        parameters: Sequence[torch.Tensor | None] = (),
        chunks: int = 1,
        check: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The same exchange around any experts.

        Raises what :meth:`fused_moe` raises, and ValueError where compute's result is not of its rows' shape and dtype.

        Args:
            compute: ``compute(rows [N, H], weights [N, K], ids [N, K], *parameters) -> [N, H]`` in rows' dtype, for
                the tokens that came to this rank; ids count this rank's experts, -1 is to be skipped. Not called
                without tokens or experts. Rows may be views with gaps between them.
            hidden, weights, ids, chunks: as :meth:`fused_moe` takes them.
            parameters: what compute is differentiated in, besides rows and weights. Their gradients are 0 on a rank
                whose experts have nothing to do, where tensors that compute holds in any other way have none.
            check: refuses further arguments, before anything is sent.

        Returns:
            [T, H] in hidden's dtype.
        """
        parameters = tuple(parameters)
        tensors = [x for x in (hidden, weights, *parameters) if isinstance(x, torch.Tensor)]
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        with self._agreement.reported():
            plan = self._plan(hidden, weights, ids, chunks, gradients, check)
            options = {"experts": self.num_local, "gradients": gradients}
            return exchange(self._agreement, plan, compute, hidden, weights, parameters, **options)

    def _check(self, hidden, weights, ids, chunks):
        check_int("chunks", chunks, 1, MAX_CHUNKS)
        check_tensor("hidden", hidden, rank=2, dtypes=FLOATS)
        check_tensor("ids", ids, shape=(hidden.shape[0], None), dtypes=(torch.int32,), device=hidden.device)
        check_tensor("weights", weights, shape=tuple(ids.shape), dtypes=(torch.float32,), device=hidden.device)
        check_int("top_k (ids.shape[1])", ids.shape[1], 1)
        if self.capacity is not None and hidden.shape[0] > self.capacity:
            raise ValueError(
                f"hidden: got {hidden.shape[0]} tokens, at most the capacity, {self.capacity}, are accepted"
            )

    def _plan(self, hidden, weights, ids, chunks, gradients, check):
        """Check the arguments here and, with the other ranks, the sizes; then lay out what is sent in each chunk."""
        refused = None
        try:
            self._check(hidden, weights, ids, chunks)
            if check is not None:
                check()
        except (TypeError, ValueError, NotImplementedError) as error:
            refused = error
        if refused is not None:
            if self.capacity is None or not self._known:
                self._agreement.refuse(refused, _device(hidden, self.group))
            raise refused
        tokens, top_k = ids.shape
        sizes = {
            "num_experts": self.num_experts,
            "experts_per_rank": self.experts_per_rank,
            "hidden_size": hidden.shape[1],
            "dtype": hidden.dtype,
            "top_k": top_k,
            "chunks": chunks,
            "capacity": self.capacity,
            "gradients": gradients,
        }
        cuts = [tokens * c // chunks for c in range(chunks + 1)]
        owner = self._owners(ids)
        present = (owner.unsqueeze(2) == torch.arange(self.size, device=ids.device)).any(1)  # [T, R]
        if self.capacity is not None:
            kind = tuple(sizes.values())
            if kind not in self._known:
                self._agreement.agree(sizes, torch.zeros(self.size, chunks, dtype=torch.int64, device=ids.device))
                self._known.add(kind)
            rows = -(-self.capacity // chunks)
            sent = received = [[rows] * self.size] * chunks
            counts = torch.full((self.size, chunks), rows, device=ids.device)
        else:
            counts = torch.stack([present[a:b].sum(0) for a, b in pairwise(cuts)], 1)  # [R, C]
            sent, received = self._agreement.agree(sizes, counts)
        starts = counts.cumsum(0) - counts  # [R, C] where the rows for a rank begin
        return [
            (slice(a, b), self._chunk(ids[a:b], owner[a:b], present[a:b], start, *splits))
            for a, b, start, *splits in zip(cuts, cuts[1:], starts.unbind(1), sent, received)
        ]

    def _tables(self, device):
        """The rank that owns each expert, with R behind the last, and each rank's first expert; copied once."""
        if device not in self._on_device:
            owners = [rank for rank, count in enumerate(self.experts_per_rank) for _ in range(count)]
            self._on_device[device] = (
                torch.tensor([*owners, self.size], device=device),
                torch.tensor(self._first[:-1], device=device),
            )
        return self._on_device[device]

    def _owners(self, ids):
        """[T, K] int64: the rank that owns each id, R for an id that is no expert."""
        none = (ids < 0) | (ids >= self.num_experts)
        return self._tables(ids.device)[0][ids.masked_fill(none, self.num_experts).long()]

    def _chunk(self, ids, owner, present, start, sent, received):
        """Rows are sorted by receiving rank, then by token."""
        rows, count = sum(sent), ids.shape[0]
        row = torch.where(present, present.cumsum(0) - 1 + start, rows)  # [tokens, R]
        source = row.new_full((rows + 1,), -1)
        source.scatter_(0, row.flatten(), torch.arange(count * self.size, device=ids.device))
        source = source[:rows]  # token * R + rank; -1 in what a capacity leaves free
        used, token, rank = source >= 0, source.clamp(min=0) // self.size, source.clamp(min=0) % self.size
        if count:
            mine = used.unsqueeze(1) & (owner[token] == rank.unsqueeze(1))
            local_ids = torch.where(mine, ids[token] - self._tables(ids.device)[1][rank].unsqueeze(1), -1).int()
        else:
            local_ids = ids.new_full((rows, ids.shape[1]), -1)
        here = owner < self.size
        slot_rows = row.gather(1, owner.clamp(max=self.size - 1)).masked_fill(~here, rows)
        slots = row.sort(1).values[:, : min(ids.shape[1], self.size)]
        return Chunk(token, local_ids, slots, slot_rows, sent, received)


def _device(hidden, group):
    """Where to exchange, whatever came as hidden."""
    if isinstance(hidden, torch.Tensor):
        return hidden.device
    return torch.device({"nccl": "cuda", "hccl": "npu"}.get(dist.get_backend(group), "cpu"))
