"""What kind of hyper-connection a model has."""

from dataclasses import dataclass, field
from enum import Enum

from mla_kernels.checks import check_choice, check_int

MOST_STREAMS = 4
MOST_ITERATIONS = 64


class StreamMix(str, Enum):
    """What becomes of the streams around a layer, and with it what stands in fn, base and scale.

    ========= ======================================= ========================== ======================= ==============
    mix       stream n behind a layer                 post                       rows of fn; scale       found in
    ========= ======================================= ========================== ======================= ==============
    sinkhorn  post_n out + sum_j comb[j, n] stream_j  magnitude sigmoid(l)       N, N, N N of pre, post, DeepSeek-V4,
                                                                                 comb; 3                 GLM-5-next
    identity  post_n out + stream_n                   magnitude sigmoid(l) + eps N, N of pre, post; 2    HY-V4
    ========= ======================================= ========================== ======================= ==============
    """

    SINKHORN = "sinkhorn"
    IDENTITY = "identity"


_MIXES = {mix.value: mix for mix in StreamMix}


@dataclass(frozen=True)
class HyperForm:
    """The constants of a model's hyper-connections.

    Args:
        mix: a :class:`StreamMix` or its value.
        iterations: how often Sinkhorn's algorithm divides the columns, 1 to 64; not used with "identity".
        eps: added to pre, to the softmax that Sinkhorn's algorithm begins with and to the sums by which it divides;
            with "identity" to pre and post. Above 0.
        norm_eps: of the norm before the projection, and of the layer's own norm where an op applies it.
        magnitude: factor of post: 2, or what HY-V4's ``hc_magnitude`` says.

    Raises:
        ValueError, TypeError: an argument that is not accepted.
    """

    mix: StreamMix | str = StreamMix.SINKHORN
    iterations: int = 20
    eps: float = 1e-6
    norm_eps: float = 1e-6
    magnitude: float = 2.0
    arguments: tuple[str, int, float, float, float] = field(init=False, repr=False, compare=False)
    """mix, iterations, eps, norm_eps, magnitude: what a torch op takes, for :data:`OP_ARGUMENTS`."""

    def __post_init__(self):
        check_choice("mix", self.mix, tuple(_MIXES))
        object.__setattr__(self, "mix", _MIXES[self.mix])
        check_int("iterations", self.iterations, 1, MOST_ITERATIONS)
        for name, floor in (("eps", 0.0), ("norm_eps", 0.0), ("magnitude", float("-inf"))):
            value = float(getattr(self, name))
            if not floor < value < float("inf"):
                raise ValueError(f"{name}: got {value}, a number above {floor:g} is accepted")
            object.__setattr__(self, name, value)
        arguments = (self.mix.value, self.iterations, self.eps, self.norm_eps, self.magnitude)
        object.__setattr__(self, "arguments", arguments)

    def rows(self, streams: int) -> int:
        """Rows of fn, M."""
        return (2 + streams) * streams if self.mix is StreamMix.SINKHORN else 2 * streams

    @property
    def scales(self) -> int:
        """Values of scale."""
        return 3 if self.mix is StreamMix.SINKHORN else 2


SINKHORN = HyperForm()
"""DeepSeek-V4's and GLM-5-next's, but for norm_eps."""

OP_ARGUMENTS = "str mix, int iterations, float eps, float norm_eps, float magnitude"
