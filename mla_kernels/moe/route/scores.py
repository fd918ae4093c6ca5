"""What the routers' kernels share: scores of logits, their slopes, the slots that a token ends with, and the parts of
their declarations."""

from mla_kernels.language import tl, triton
from mla_kernels.launch import Work

MAX_STRIDE = 1 << 26  # elements between two rows, so that offsets within a tile of up to 16 fit 32 bits
SCORINGS = ("sigmoid", "softmax", "sqrt_softplus")


@triton.jit
def _log1p(x):
    """log(1 + x) of x in [0, 1], without the loss of a small x in 1 + x."""
    y = 1.0 + x
    exact = y == 1.0
    return tl.where(exact, x, tl.log(y) * (x / tl.where(exact, 1.0, y - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def router_scores(x, present, SCORING: tl.constexpr):
    """Scores [rows, experts] of fp32 logits; those that are not ``present`` take no part in a softmax."""
    if SCORING == "softmax":
        x = tl.where(present, x, float("-inf"))
        power = tl.exp(x - tl.max(x, 1)[:, None])
        return power / tl.sum(power, 1)[:, None]
    elif SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.sqrt(softplus(x))


@triton.jit
def score_slopes(x, scores, SCORING: tl.constexpr):
    """Derivative of each score by its own logit, over the score; 1 for softmax, whose other half is the caller's."""
    if SCORING == "softmax":
        return tl.full(x.shape, 1.0, tl.float32)
    elif SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(x))  # 1 - sigmoid(x), exact where the score is near 1
    else:
        squared = scores * scores
        return tl.where(squared > 0.0, 0.5 / ((1.0 + tl.exp(-x)) * tl.where(squared > 0.0, squared, 1.0)), 0.0)


@triton.jit
def finished_slots(
    weight,
    total,
    chosen,
    slot_f,
    routed_scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """(weights, experts) [rows, slots] of chosen scores, which are 0 past TOP_K; the shared experts follow them.

    ``total`` [rows] is the sum of a row's scores, added slot by slot: in one order on every device."""
    if RENORMALIZE:
        weight = weight / (total[:, None] + 1.0e-20)
    weight = weight * routed_scale
    if SHARED > 0:
        routed = (slot_f < TOP_K)[None, :]
        weight = tl.where(routed, weight, 1.0)
        chosen = tl.where(routed, chosen, (slot_f + (EXPERTS - TOP_K))[None, :])
    return weight, chosen


def near_rows(x):
    """``x``, copied where its rows lie too far apart for a tile's offsets."""
    return x.contiguous() if x.stride(0) > MAX_STRIDE else x


def router_statics(experts, top_k, shared, scoring, renormalize, slots):
    """Constants of a kernel that reads a token's logits and ``slots`` of its slots."""
    return {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "SHARED": shared,
        "SCORING": scoring,
        "RENORMALIZE": renormalize,
        "BLOCK_E": max(16, 1 << (experts - 1).bit_length()),  # reductions narrower than 8 lose lanes on Ascend
        "BLOCK_K": max(8, 1 << (slots - 1).bit_length()),
    }


def router_tiles(ascend_scores):
    """``tiles``, ``rule`` and ``memory`` of a router's kernel: one tile for all numbers of tokens.

    A row's sum must have the same bits whatever else is in the batch, and its order follows from how the row lies over
    threads: the tile decides that, and so does what is known of alignment, since an aligned row is loaded, and then
    added, several neighbours a thread. So a program of one warp takes one row, and the kernel is one instance for every
    number of tokens, stride and alignment. On Ascend a tile holds the ``ascend_scores`` that the live rows of a token
    leave room for in UB, and any other tile counts as too large.
    """

    def rows(chip, statics):
        return 1 if chip.is_gpu else max(1, ascend_scores // statics["BLOCK_E"])

    def memory(chip, dtype, statics, tile):
        if chip.is_gpu:
            return {"shared": 0}
        fits = tile["BLOCK_T"] == rows(chip, statics)
        return {"UB": 20 * 4 * tile["BLOCK_T"] * statics["BLOCK_E"] if fits else chip.memory["UB"] + 1}

    return {
        "tiles": {"BLOCK_T": (1,), "num_warps": (1,)},
        "rule": lambda chip, dtype, statics, sizes: {"BLOCK_T": rows(chip, statics), "num_warps": 1},
        "memory": memory,
    }


def router_work(cost):
    """Work of a kernel of this cost whose programs take BLOCK_T tokens each."""

    def work(dtype, statics, sizes, tile):
        programs = -(-sizes["tokens"] // tile["BLOCK_T"])
        whole = cost(dtype, statics, sizes)
        padding = statics["BLOCK_E"] / statics["EXPERTS"] * programs * tile["BLOCK_T"] / max(sizes["tokens"], 1)
        return Work(programs, padding * whole.flops / max(programs, 1), whole.bytes / max(programs, 1))

    return work
