"""The cache that Triton asks while a bundle is loaded: the bundles first, then the one that it would have asked."""

import functools

from mla_kernels.language import HAS_TRITON

if HAS_TRITON:
    from triton.runtime.cache import CacheManager, FileCacheManager
else:
    CacheManager = FileCacheManager = object

LOADED: list = []
"""Bundles, the last loaded first; each has ``entries``, ``fits_device``, ``found`` and ``missed``."""
BEFORE: list = [None]
"""The manager that Triton had, None for its own."""


class BundledFirst(CacheManager):
    """One kernel's entry, under Triton's key of it. Only what no bundle holds touches the cache on disk."""

    def __init__(self, key, override=False, dump=False):
        self._arguments = key, override, dump
        self._group = None if override or dump else _look_up(key)

    @functools.cached_property
    def _behind(self):
        key, override, dump = self._arguments
        manager = BEFORE[0] or FileCacheManager
        return manager(key, override=override, dump=dump) if override or dump else manager(key)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._behind, name)

    def get_file(self, filename):
        """Path of one file, or None."""
        if self._group is not None and filename in self._group:
            return self._group[filename]
        return self._behind.get_file(filename)

    def get_group(self, filename):
        """Paths of a kernel's files by name, or None."""
        if self._group is not None and filename in self._group:
            return dict(self._group)
        group = self._behind.get_group(filename)
        if group is None:
            for bundle in LOADED:
                bundle.note_missing(filename)
        return group

    def put(self, data, filename, binary=True):
        """Store a file in the cache on disk; its path."""
        return self._behind.put(data, filename, binary=binary)

    def put_group(self, filename, group):
        """Store which files belong together."""
        return self._behind.put_group(filename, group)


def _look_up(key):
    for bundle in list(LOADED):
        if bundle.fits_device() and key in bundle.entries:
            return bundle.take(key)
    return None
