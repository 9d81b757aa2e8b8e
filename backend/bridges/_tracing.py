"""Whether the trace in progress is for us: how a bridge leaves every other backend, and eager, as they were."""

from __future__ import annotations

from typing import Any

import torch

from fastft import _torch_compat as compat


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
    return is_fastft(compat.backend_in_trace())


def tracing() -> bool:
    """Whether this line is being traced by Dynamo for fastft. A constant in the graph; False in eager, for no more
    than one call.
    """
    return torch.compiler.is_dynamo_compiling() and _tracing()
