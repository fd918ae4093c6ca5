"""``python -m mla_kernels agree``: by how much an op's results differ between what runs it, on the same inputs.

``run`` calls the ops of the catalogue on one backend, ``compare`` measures, ``table`` writes the page, ``command`` is
the command.
"""
