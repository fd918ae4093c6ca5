"""Every case, in the order in which they run: the most important of all families first."""

from mla_kernels.device.case import Case
from mla_kernels.device.cases import decode, experts, hyper, indexer, latents, prefill, quantised, route, sparse, v4

FAMILIES = {
    "decode": decode.CASES,
    "moe": experts.CASES,
    "sparse": sparse.CASES,
    "prefill": prefill.CASES,
    "quant": quantised.CASES,
    "indexer": indexer.CASES,
    "route": route.CASES,
    "latent": latents.CASES,
    "hyper": hyper.CASES,
    "v4": v4.CASES,
}
"""Word of ``--only`` -> its cases. Between cases of one priority the order of families decides."""

CASES: tuple[Case, ...] = tuple(
    sorted((case for cases in FAMILIES.values() for case in cases), key=lambda case: case.priority)
)
