"""Every public op as a function of tensors alone, with an example of any number of tokens.

What holds for all ops (they are exported, compiled, checkpointed) is tested over this one list.
"""

from mla_kernels.catalogue import attention, experts, hyper, latent  # noqa: F401  (they enter the ops)
from mla_kernels.catalogue.calls import CALLS, FORMS, rope_tables

__all__ = ["CALLS", "EVERY", "rope_tables"]

_places = {name.split()[0]: place for place, name in reversed(list(enumerate(CALLS)))}
EVERY = dict(sorted((CALLS | FORMS).items(), key=lambda entry: _places[entry[0].split()[0]]))
"""With further forms, those of one function together."""
