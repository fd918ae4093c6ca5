"""``python -m mla_kernels device``: this library beside its peers on the card that is there.

It stands in ``bench/gpu`` and installs as ``mla_kernels.device``. From the ground up: ``case`` (a problem and its
contestants), ``cases`` (all of them), ``peers`` (other libraries, loaded without their packages), ``clock`` and
``measure`` (a result is checked, then timed), ``child`` and ``queue`` (cases in a process that may fault or hang),
``parity`` (the tests on the card), ``results``, ``table`` and ``svg`` (what is kept of it), ``command``.
"""
