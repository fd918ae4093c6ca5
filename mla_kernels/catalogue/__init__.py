"""Every public op as a function of tensors alone, with an example of any number of tokens.

What holds for all ops (they are exported, compiled, checkpointed) is tested over this one list.
"""

from mla_kernels.catalogue import attention, experts, hyper, latent  # noqa: F401  (they enter the ops)
from mla_kernels.catalogue.calls import CALLS, rope_tables

__all__ = ["CALLS", "rope_tables"]
