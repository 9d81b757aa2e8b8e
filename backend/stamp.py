"""A hash of everything that decides what fastft's ops compute, for torch's compile caches.

AOTAutograd's cache knows a custom op by its name only: with an edited backward formula it would hand out the old
gradient. The stamp makes an edit miss the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path


@functools.cache
def source_hash() -> str:
    """sha256 over all of fastft's source files (paths and contents) and Triton's version; hex."""
    import fastft
    import fastft.autotune
    import fastft.kernels
    import fastft.patterns

    digest = hashlib.sha256()
    for package in (fastft, fastft.kernels, fastft.patterns, fastft.autotune):
        for root in sorted(package.__path__):
            for file in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package.__name__}/{file.relative_to(root)}".encode())
                digest.update(file.read_bytes())
    try:
        digest.update(importlib.metadata.version("triton").encode())
    except importlib.metadata.PackageNotFoundError:
        digest.update(b"no triton")
    return digest.hexdigest()
