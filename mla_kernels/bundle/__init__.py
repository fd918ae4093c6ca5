"""Bundles: kernels that were compiled elsewhere, so that their first launch here compiles nothing.

``python -m mla_kernels build`` writes a folder, :func:`load` takes it up. Triton asks its cache for a kernel by a hash
of all that its code depends on; the answer now comes from the bundle first. So a launch finds exactly what it would
have compiled, or compiles as ever.
"""

from mla_kernels.bundle.loading import Bundle, load, load_named
from mla_kernels.bundle.manifest import BundleRefused

__all__ = ["Bundle", "BundleRefused", "load", "load_named"]
