"""Bridges: the few places where another library stops Dynamo before our backend is ever called.

Each is a row of :data:`TABLE` and a file with one function, ``apply(module)``, which checks that what it replaces is
what it knows, and otherwise raises with the reason. Where a way of compiling cannot work without the bridge, the file
has ``refuse(module, why)`` too, which makes an error of it that says what to use. None changes a model's maths, and
none changes what another backend, or no backend, does. ``FASTFT_BRIDGES="-trl_head"`` switches one off. :func:`rows` is
what the report shows.

The first bridge is laid before anything is compiled (:mod:`fastft.autoload`), so this module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

from fastft.autoload import when_imported
from fastft.bridges._bridge import (
    INSTALLED,
    NOT_NEEDED,
    PROBLEMS,
    STAYED_OUT,
    SWITCHED_OFF,
    Bridge,
    NotNeeded,
    Spec,
    StayOut,
    check_version,
    note,
    switched_off,
)

__all__ = ["TABLE", "Bridge", "install", "problems", "rows"]

TABLE: tuple[Spec, ...] = (
    Spec(
        "accelerate_backend",
        modules=("accelerate.utils.dataclasses",),
        library="accelerate",
        oldest="1.0",
        does='torch_compile_backend="fastft" is a backend that accelerate knows',
        otherwise='use model.compile(backend="fastft") in place of torch_compile_backend="fastft"',
    ),
    Spec(
        "compiled_wrapper",
        modules=("transformers.trainer", "peft.peft_model"),
        library="transformers",
        oldest="5.17",
        does="a torch.compile wrapper given to a trainer or to PEFT is compiled in place: they see the model itself",
        otherwise='use model.compile(backend="fastft"), which makes no wrapper; a wrapper is refused',
    ),
    Spec(
        "peft_hook",
        modules=("transformers.modeling_utils", "peft.peft_model", "peft.mixed_model", "peft.utils.other"),
        library="transformers",
        oldest="5.17",
        does="the hook that makes embeddings require a gradient is traced, where it would split the graph",
        otherwise="with enable_input_require_grads the graph is split behind the embedding, and compiling takes longer",
    ),
    Spec(
        "trl_head",
        modules=("trl.trainer.utils",),
        library="trl",
        oldest="1.16",
        does="TRL's chunked head is traced as one linear_log_prob, and what holds it may compile 32 times",
        otherwise="the model's backbone is compiled, TRL's head runs in eager",
    ),
    Spec(
        "peft_dora",
        modules=("peft.utils.integrations", "peft.tuners.lora.dora"),
        library="peft",
        oldest="0.21",
        does="DoRA's look at the base weight is traced, where it would break the graph in every layer",
        otherwise="DoRA breaks the graph in every adapted layer",
    ),
    Spec(
        "transformers_flex",
        modules=("transformers.masking_utils",),
        library="transformers",
        oldest="5.17",
        does="FlexAttention's block mask is made in the model's graph, where making it would break the graph",
        otherwise='with attn_implementation="flex_attention" the graph breaks at the mask, and its calls stay',
    ),
    Spec(
        "bnb_linear",
        modules=("bitsandbytes",),
        library="bitsandbytes",
        oldest="0.50",
        does="a 4-bit layer's product is one node in the graph, where its forward and backward would be traced",
        otherwise="tracing a model of 4-bit layers takes longer",
    ),
)

_log = logging.getLogger("fastft")
_NAMES = tuple(spec.name for spec in TABLE)
#: name of bridge → module → how it went: status and reason.
_OUTCOMES: dict[str, dict[str, tuple[str, str]]] = {}
#: bridges that were found switched off, and said to be.
_TOLD: set[str] = set()
#: bridges that were found switched off, in whose place errors were put.
_REFUSED: set[str] = set()


def install(*names: str) -> None:
    """Lay the bridges named (default: all) for every library that is imported, and for the others as soon as they are.

    Idempotent. Raises ``ValueError`` when ``FASTFT_BRIDGES`` names a bridge that does not exist; a bridge itself never
    raises.
    """
    off = switched_off(_NAMES)
    for spec in TABLE:
        if spec.name in off and not names and spec.name not in _TOLD:
            # Something is compiled with fastft in this process: what the switch costs is said once.
            _TOLD.add(spec.name)
            _log.warning("bridge %s is switched off by FASTFT_BRIDGES: %s", spec.name, spec.otherwise)
        if spec.name in off and spec.name not in _REFUSED and (not names or spec.name in names):
            _REFUSED.add(spec.name)
            for module in spec.modules:
                when_imported(module, lambda m, spec=spec: _refuse(spec, m, "FASTFT_BRIDGES switches it off"))  # type: ignore[misc]
        if spec.name in off or spec.name in _OUTCOMES or (names and spec.name not in names):
            continue
        _OUTCOMES[spec.name] = {}
        for module in spec.modules:
            when_imported(module, lambda m, spec=spec: _apply(spec, m))  # type: ignore[misc]


def _apply(spec: Spec, module: ModuleType) -> None:
    try:
        check_version(spec)
        with _same_random_numbers():
            importlib.import_module(f"fastft.bridges.{spec.name}").apply(module)
        outcome = INSTALLED, spec.does
    except NotNeeded as reason:
        outcome = NOT_NEEDED, str(reason)
    except StayOut as reason:
        outcome = STAYED_OUT, str(reason)
    except Exception as error:  # This runs inside somebody's import statement, which must not fail because of us.
        outcome = STAYED_OUT, f"{type(error).__name__}: {error}"
    if outcome[0] == STAYED_OUT:
        outcome = STAYED_OUT, f"{outcome[1]}; {spec.otherwise}"
        _log.warning("bridge %s stayed out of %s: %s", spec.name, module.__name__, outcome[1])
        _refuse(spec, module, outcome[1].removesuffix(f"; {spec.otherwise}"))
    _OUTCOMES[spec.name][module.__name__] = outcome


def _refuse(spec: Spec, module: ModuleType, why: str) -> None:
    """Make an error of what cannot work without this bridge."""
    try:
        bridge = importlib.import_module(f"fastft.bridges.{spec.name}")
        if hasattr(bridge, "refuse"):
            bridge.refuse(module, why)
    except Exception as error:
        said = f"bridge {spec.name}: what cannot work without it is no error: {type(error).__name__}: {error}"
        _log.warning(said, exc_info=True)
        note(said)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Give the random state back: a bridge's check may build a small layer, in the middle of a program that has set
    its seed.
    """
    # While torch itself is being imported nobody has set a seed.
    get_state = getattr(sys.modules.get("torch"), "get_rng_state", None)
    state = get_state() if get_state is not None else None
    try:
        yield
    finally:
        if state is not None:
            sys.modules["torch"].set_rng_state(state)


def problems() -> list[str]:
    """What bridges could not do, one line each."""
    return [*PROBLEMS]


def rows() -> list[Bridge]:
    """One row for each bridge, in the table's order."""
    off = switched_off(_NAMES)
    return [_row(spec, spec.name in off) for spec in TABLE]


def _row(spec: Spec, off: bool) -> Bridge:
    if off:
        return Bridge(spec.name, SWITCHED_OFF, f"by FASTFT_BRIDGES; {spec.otherwise}")
    outcomes = _OUTCOMES.get(spec.name)
    if outcomes is None:
        return Bridge(spec.name, NOT_NEEDED, "nothing was compiled with fastft yet")
    # The worst news first: one module left alone means that something may still break there.
    for status in (STAYED_OUT, INSTALLED, NOT_NEEDED):
        reasons = {module: reason for module, (found, reason) in outcomes.items() if found == status}
        if reasons and (status == INSTALLED or len(outcomes) == 1):
            return Bridge(spec.name, status, next(iter(reasons.values())))
        if reasons:
            others = (
                ""
                if len(reasons) == len(outcomes)
                else f" (installed in the other {len(outcomes) - len(reasons)} modules)"
            )
            return Bridge(spec.name, status, "; ".join(f"{m}: {r}" for m, r in reasons.items()) + others)
    waiting = ", ".join(m for m in spec.modules if m not in sys.modules)
    return Bridge(spec.name, NOT_NEEDED, f"{waiting or spec.library} is not imported")
