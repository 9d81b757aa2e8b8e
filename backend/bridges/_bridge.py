"""What a bridge is: a row of the table, and the row of the report that comes of it."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass
from types import ModuleType

INSTALLED, STAYED_OUT, SWITCHED_OFF, NOT_NEEDED = "installed", "stayed out", "switched off", "not needed"


#: What a bridge could not do, for the report.
PROBLEMS: dict[str, None] = {}


def note(problem: str) -> None:
    """Enter a line in the report, once."""
    PROBLEMS[" ".join(problem.split())] = None


@dataclass(frozen=True)
class Bridge:
    """A row of the report. ``status`` is ``"installed"``, ``"stayed out"``, ``"switched off"`` or ``"not needed"``;
    ``reason`` is one sentence.
    """

    name: str
    status: str
    reason: str


@dataclass(frozen=True)
class Spec:
    """A row of the table of bridges.

    ``modules``: the modules of the other library that it changes, each as soon as it is imported, by
    ``fastft.bridges.<name>.apply(module)``.
    ``library``, ``oldest``: the first version it was made for (no newest: what it replaces is checked instead).
    ``does``, ``otherwise``: for the report, what it changes, and what to expect or do without it.
    """

    name: str
    modules: tuple[str, ...]
    library: str
    oldest: str
    does: str
    otherwise: str


class StayOut(Exception):
    """What the bridge would replace is not what it knows. The message says what was found."""


class NotNeeded(Exception):
    """The library already does what the bridge is for."""


def version_of(library: str) -> tuple[int, ...]:
    """``(1, 16, 0)`` of an imported library; raises :class:`StayOut` if it does not say."""
    text = str(getattr(sys.modules.get(library), "__version__", ""))
    number = re.match(r"\d+(\.\d+)*", text)
    if number is None:
        raise StayOut(f"{library} has no version that could be read ({text!r})")
    return tuple(int(n) for n in number.group().split("."))


def check_version(spec: Spec) -> None:
    """Raise :class:`StayOut` when the library is older than the bridge is right for."""
    found = version_of(spec.library)
    if found < tuple(int(n) for n in spec.oldest.split(".")):
        raise StayOut(f"needs {spec.library} >= {spec.oldest}, found {'.'.join(map(str, found))}")


def switched_off(names: tuple[str, ...]) -> frozenset[str]:
    """The bridges that ``FASTFT_BRIDGES`` switches off: ``"-trl_head,-peft_hook"``, or ``"0"`` for all of them.

    Raises ``ValueError`` for anything else, naming the nearest bridge.
    """
    asked = os.environ.get("FASTFT_BRIDGES", "")
    if asked.strip() == "0":
        return frozenset(names)
    off = set()
    for word in filter(None, (w.strip() for w in asked.split(","))):
        name = word.removeprefix("-")
        if word == name or name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            nearest = f" (did you mean '-{close[0]}'?)" if close else ""
            allowed = ", ".join(f"-{n}" for n in names)
            raise ValueError(f"FASTFT_BRIDGES has {word!r}{nearest}; it is 0 (no bridge), or words out of {allowed}")
        off.add(name)
    return frozenset(off)


def attribute(module: ModuleType, path: str) -> object:
    """``module.<path>`` (dotted), or :class:`StayOut` naming what is missing."""
    found: object = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise StayOut(f"{module.__name__} has no {path}")
        found = getattr(found, part)
    return found
