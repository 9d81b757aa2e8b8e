"""Runs while torch is being imported (entry point group ``torch.backends``): imports nothing heavy, costs under 2 ms, and cannot raise.

It is there for one bridge. accelerate refuses the name of a backend that it does not know before torch is asked for it, so that bridge has to be laid
before any model is compiled; all the others wait until torch looks the backend up. ``FASTFT_AUTOLOAD=0`` turns it off.
"""

from __future__ import annotations

import os


def autoload() -> None:
    """Let accelerate know the backend's name, once accelerate is imported."""
    if os.environ.get("FASTFT_AUTOLOAD", "1") == "0":
        return
    try:
        from fastft import bridges

        bridges.install("accelerate_backend")
    except Exception:  # torch makes an error here an error of `import torch`.
        return
