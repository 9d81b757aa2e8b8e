"""Python's garbage collector, which is in the way where a deep model's graphs are made: it looks at all objects that
there are again and again, and nearly all of them stay.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """In here no garbage is collected. It takes a good part of the time of a plan, and some of a compilation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
