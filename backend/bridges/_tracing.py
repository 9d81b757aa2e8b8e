"""Whether the trace in progress is for us: how a bridge leaves every other backend, and eager, as they were."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fastft import _torch_compat as compat

_log = logging.getLogger("fastft")
#: Why bridges cannot be used: said once.
_SAID: list[Exception] = []


def is_fastft(backend: Any) -> bool:
    """Whether ``backend`` (a name, a function, with or without torch's wrappers) is fastft: registered as such, or a
    function of this package's.
    """
    if isinstance(backend, str):
        return backend == "fastft"
    inner = compat.innermost_backend(backend)
    return inner is not None and (
        inner is compat.registered_backend("fastft") or str(getattr(inner, "__module__", "")).split(".")[0] == "fastft"
    )


@torch.compiler.assume_constant_result
def _tracing() -> bool:
    # Dynamo runs this for real while it traces. Its answer needs no guard of its own: compiled code is never shared
    # between backends.
    try:
        return is_fastft(compat.backend_in_trace())
    except Exception as error:  # raised in the middle of somebody's model, it would end the training
        if not _SAID:
            _SAID.append(error)
            _log.warning("no bridge is used, torch does not say what it traces for: %s", error, exc_info=True)
        return False


def tracing() -> bool:
    """Whether this line is being traced by Dynamo for fastft. A constant in the graph; False in eager, for no more
    than one call.
    """
    return torch.compiler.is_dynamo_compiling() and _tracing()
