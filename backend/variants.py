"""Variants of fastft's ops: other functions that compute the same. ``docs/variants.md`` has a complete example.

``register`` enters one, ``list(op)`` and ``get(op, name)`` say what there is; ``options={"variants": {op: name}}``
takes one. ``Reason`` is what a ``supported`` function may answer with, ``Space`` declares the configurations of a
kernel.
"""

from __future__ import annotations

from fastft.autotune.variants import Cost, NotSupported, Reason, Space, Variant, get, register
from fastft.autotune.variants import listed as list

__all__ = ["Cost", "NotSupported", "Reason", "Space", "Variant", "get", "list", "register"]
