"""``python -m mla_kernels build``: the kernels that a model's ops launch, compiled for a device that need not be here.

:mod:`.steps` says which ops at which sizes, :mod:`.launches` which kernels they launch, :mod:`.gpu` and :mod:`.ascend`
compile them, :mod:`.build` writes the bundle that :mod:`mla_kernels.bundle` loads.
"""
