"""A batch of tokens laid end to end, and where the real ones of padded rows stand."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Tokens(NamedTuple):
    """A batch laid end to end."""

    hidden: torch.Tensor  # [tokens, hidden_size]
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor  # [tokens]

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        return self.cos, self.sin, self.positions

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each token, [tokens, rope / 2]; positions outside the tables take their ends, as in ops."""
        place = self.positions.long().clamp(0, self.cos.shape[0] - 1)
        return self.cos[place], self.sin[place]


class Span(NamedTuple):
    """Where the tokens of each row of a padded batch stand: [leading, leading + real), int32 [batch] both."""

    leading: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of(cls, slot_mapping: torch.Tensor) -> "Span":
        real = slot_mapping >= 0  # [batch, tokens]
        leading = (real.cumsum(1) == 0).sum(1)
        return cls(leading.to(torch.int32), real.sum(1).to(torch.int32))

    def bounds(self, first: torch.Tensor, second: torch.Tensor, width: int) -> torch.Tensor:
        """cu_seqlens of three sequences a row: ``first`` tokens, ``second`` tokens, and the rest of ``width``.

        So padding attends to padding, and nothing is moved, nor any length read back: rows of 4 tokens with
        first = [1, 0] and second = [3, 2] have the sequences [0, 1), [1, 4), [4, 4), [4, 4), [4, 6), [6, 8).
        """
        lengths = torch.stack((first, second, width - first - second), 1).flatten()
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def causal_rows(span: Span, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(starts, ends) int32 [batch * width]: the rows of a flattened padded batch that each of its tokens sees."""
    place = torch.arange(width, dtype=torch.int32, device=span.leading.device)
    row = torch.arange(len(span.leading), dtype=torch.int32, device=place.device)[:, None] * width
    inside = (place >= span.leading[:, None]) & (place < (span.leading + span.real)[:, None])  # [batch, width]
    starts = (row + span.leading[:, None]).expand_as(inside).contiguous()  # of one row, flatten would keep stride 0
    return starts.flatten(), torch.where(inside, row + place + 1, starts).flatten()
