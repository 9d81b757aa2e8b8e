"""Bridges: the few places where another library stops Dynamo before our backend is ever called.

Each is a row of :data:`TABLE` and a file with one function, ``apply(module)``, which checks that what it replaces is what it knows, and otherwise
raises with the reason. None changes a model's maths, and none changes what another backend, or no backend, does. ``FASTFT_BRIDGES="-trl_head"``
switches one off. :func:`rows` is what the report shows.

This module imports nothing heavy: the first bridge is laid while torch is being imported (:mod:`fastft.autoload`).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from fastft.bridges._bridge import (
    INSTALLED,
    NOT_NEEDED,
    STAYED_OUT,
    SWITCHED_OFF,
    Bridge,
    NotNeeded,
    Spec,
    StayOut,
    check_version,
    switched_off,
)
from fastft.bridges._when_imported import when_imported

__all__ = ["TABLE", "Bridge", "install", "rows"]

TABLE: tuple[Spec, ...] = (
    Spec(
        "accelerate_backend",
        ("accelerate.utils.dataclasses",),
        "accelerate",
        "1.0",
        'torch_compile_backend="fastft" is a backend that accelerate knows',
    ),
    Spec(
        "compiled_wrapper",
        ("transformers.trainer",),
        "transformers",
        "5.0",
        "a torch.compile wrapper given to a trainer is compiled in place instead, so that the trainer sees the model itself",
    ),
    Spec(
        "peft_hook",
        ("transformers.modeling_utils", "peft.peft_model", "peft.mixed_model", "peft.utils.other"),
        "transformers",
        "5.0",
        "the hook that makes embeddings require a gradient is traced instead of splitting the graph",
    ),
    Spec(
        "trl_head",
        ("trl.trainer.utils",),
        "trl",
        "1.16",
        "TRL's chunked head is traced as one linear_log_prob, without the graph breaks around it",
    ),
    Spec(
        "peft_dora",
        ("peft.utils.integrations", "peft.tuners.lora.dora"),
        "peft",
        "0.17",
        "DoRA's look at the base weight is traced instead of breaking the graph at every layer",
    ),
)

_NAMES = tuple(spec.name for spec in TABLE)
#: name of bridge → module → how it went: status and reason.
_OUTCOMES: dict[str, dict[str, tuple[str, str]]] = {}


def install(*names: str) -> None:
    """Lay the bridges named (default: all) for every library that is imported, and for the others as soon as they are.

    Idempotent. Raises ``ValueError`` when ``FASTFT_BRIDGES`` names a bridge that does not exist; a bridge itself never raises.
    """
    off = switched_off(_NAMES)
    for spec in TABLE:
        if spec.name in off or spec.name in _OUTCOMES or (names and spec.name not in names):
            continue
        _OUTCOMES[spec.name] = {}
        for module in spec.modules:
            when_imported(module, lambda m, spec=spec: _apply(spec, m))  # type: ignore[misc]


def _apply(spec: Spec, module: ModuleType) -> None:
    try:
        check_version(spec)
        importlib.import_module(f"fastft.bridges.{spec.name}").apply(module)
        outcome = INSTALLED, spec.does
    except NotNeeded as reason:
        outcome = NOT_NEEDED, str(reason)
    except StayOut as reason:
        outcome = STAYED_OUT, str(reason)
    except Exception as error:  # This runs inside somebody's import statement, which must not fail because of us.
        outcome = STAYED_OUT, f"{type(error).__name__}: {error}"
    _OUTCOMES[spec.name][module.__name__] = outcome


def rows() -> list[Bridge]:
    """One row for each bridge, in the table's order."""
    off = switched_off(_NAMES)
    return [_row(spec, spec.name in off) for spec in TABLE]


def _row(spec: Spec, off: bool) -> Bridge:
    if off:
        return Bridge(spec.name, SWITCHED_OFF, "by FASTFT_BRIDGES")
    outcomes = _OUTCOMES.get(spec.name)
    if outcomes is None:
        return Bridge(spec.name, NOT_NEEDED, "nothing was compiled with fastft yet")
    # The worst news first: one module left alone means that something may still break there.
    for status in (STAYED_OUT, INSTALLED, NOT_NEEDED):
        reasons = {module: reason for module, (found, reason) in outcomes.items() if found == status}
        if reasons:
            where = "" if len(spec.modules) == 1 or status == INSTALLED else f"{', '.join(reasons)}: "
            return Bridge(spec.name, status, where + "; ".join(dict.fromkeys(reasons.values())))
    waiting = ", ".join(m for m in spec.modules if m not in sys.modules)
    return Bridge(spec.name, NOT_NEEDED, f"{waiting or spec.library} is not imported")
