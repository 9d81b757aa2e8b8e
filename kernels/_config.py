"""Launch configurations: block sizes, warps and stages of a Triton kernel, as a declared search space with a heuristic.

A kernel's file says, once, what may be chosen, what is legal, and what is taken where nobody has measured::

    FORWARD = Space(
        "rms_norm.forward", {"BLOCK_M": (1, 2, 4), "num_warps": (4, 8)}, _heuristic, tokens=("rows",), sizes=("n",)
    )

and its launcher asks ``FORWARD(x.device, x.dtype, rows, n)`` with the sizes that matter, in the order in which the
space names them. What comes back is the heuristic's configuration, with what ``fastft tune`` found best for such sizes
on such a device in its place. With nothing tuned it is the heuristic's, exactly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("fastft")

Config = dict[str, int]

#: Registers that a thread may have, 4 bytes each.
REGISTERS = 255
#: Shared memory of a block on Hopper and data-centre Blackwell, bytes. Less elsewhere: a candidate that does not fit
#: there fails to launch while tuning, which is noted.
SHARED_BYTES = 227 * 1024
#: More sizes than this are not kept for one kernel (a run where every batch has another length).
MOST_KEPT = 4096

#: Kernel → why its tuned configuration could not be looked up; the heuristic's is taken.
FAILED: dict[str, str] = {}


class Space:
    """The configurations of one kernel.

    ``kernel``: its name, ``op.kernel``. ``values``: parameter → what it can be. ``heuristic(device, dtype, *sizes)``:
    the configuration where nothing is tuned; it may hold more than ``values`` names (what follows from the sizes).
    ``tokens``, ``sizes``: names of the sizes that a launch passes, in order, first those that differ from batch to
    batch (tuned for each power of two), then those that the model fixes (tuned for each). ``legal(config, device,
    dtype, *sizes)``: None, or why a configuration cannot run, said before anything is compiled. ``waste(config, device,
    dtype, *sizes)``: what the tiles pad, as the factors by which a kernel computes and moves more than its op's cost
    says (a masked element is computed, and not moved). Tuning leaves out what is too slow by that; without it nothing.
    """

    def __init__(
        self,
        kernel: str,
        values: Mapping[str, tuple[int, ...]],
        heuristic: Callable[..., Config],
        *,
        tokens: tuple[str, ...] = (),
        sizes: tuple[str, ...] = (),
        legal: Callable[..., str | None] | None = None,
        waste: Callable[..., tuple[float, float]] | None = None,
    ) -> None:
        if kernel in SPACES:
            raise ValueError(f"a space for {kernel!r} is registered already, by {SPACES[kernel].file}")
        self.kernel, self.values, self.heuristic, self.tokens, self.sizes = kernel, values, heuristic, tokens, sizes
        self._legal, self._waste = legal, waste
        self.file: Path = Path(sys._getframe(1).f_code.co_filename)
        self.explicit: Config | None = None
        #: What was asked for while :func:`listening`, in order.
        self.asked: dict[tuple[Any, ...], None] | None = None
        self._kept: dict[tuple[Any, ...], Config] = {}
        SPACES[kernel] = self

    def __call__(self, *key: Any) -> Config:
        """The configuration for ``key``: device, dtype, and the sizes in the order of ``tokens`` and ``sizes``."""
        kept = self._kept.get(key)
        if kept is not None:
            return kept.copy()
        config = {**self.heuristic(*key), **(self._look_up(key) or {})}
        if self.asked is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[key] = config.copy()
        return config

    def _look_up(self, key: tuple[Any, ...]) -> Config | None:
        """What is chosen in place of the heuristic's; None: nothing. It never raises: a kernel is about to run."""
        if self.asked is not None:
            self.asked[key] = None
        tuned: Config | None = None
        try:
            from fastft.autotune import database

            tuned, _ = database.select_config(self, key, self.explicit)
        except Exception as error:
            FAILED[self.kernel] = f"{type(error).__name__}: {error}"
            log.warning("the tuned configuration of %s could not be looked up: %s", self.kernel, error, exc_info=error)
        return tuned

    def legal(self, config: Mapping[str, int], *key: Any) -> str | None:
        """None, or why this configuration is not one for ``key``: a value that is not declared, or one that cannot
        run."""
        for name, value in config.items():
            if value not in self.values.get(name, ()):
                allowed = self.values.get(name)
                return f"{name} is {value}, not one of {allowed}" if allowed else f"{name} is no parameter of it"
        if self._legal is None or dict(config) == self.chosen(*key):  # the heuristic's runs, whatever an estimate says
            return None
        return self._legal({**self.heuristic(*key), **config}, *key)

    def candidates(self, *key: Any) -> tuple[list[Config], dict[str, str]]:
        """Every declared configuration that is legal for ``key``; and what is not, by :func:`shown`, with why."""
        found, refused = [], {}
        for values in itertools.product(*self.values.values()):
            config = dict(zip(self.values, values, strict=True))
            if (why := self.legal(config, *key)) is None:
                found.append(config)
            else:
                refused[shown(config)] = why
        return found, refused

    def waste(self, config: Mapping[str, int], *key: Any) -> tuple[float, float] | None:
        """The factors by which this configuration's FLOPs and bytes exceed the op's cost; None where the space does not
        say."""
        return None if self._waste is None else self._waste({**self.heuristic(*key), **config}, *key)

    def chosen(self, *key: Any) -> Config:
        """The part of the heuristic's configuration that the space declares."""
        config = self.heuristic(*key)
        return {name: config[name] for name in self.values}

    @contextlib.contextmanager
    def using(self, config: Config | None) -> Iterator[None]:
        """Within, launches take ``config`` (for any sizes; None: what they would)."""
        before, self.explicit = self.explicit, config
        self._kept.clear()
        try:
            yield
        finally:
            self.explicit = before
            self._kept.clear()

    @functools.cached_property
    def source(self) -> str:
        """sha256 of :func:`launching`, hex: an edit makes what was measured before void."""
        return _sha256(launching(self.file))


#: An import of other kernels' files: ``from fastft.kernels import nf4``, ``from fastft.kernels._rows import size``, and
#: ``import fastft.kernels.nf4``.
_IMPORT = re.compile(
    r"^ *(?:from fastft\.kernels(?:\.(\w+))? import (\([^)]*\)|.+)|import fastft\.kernels\.(\w+).*)$", re.MULTILINE
)


def _folder(file: Path) -> Path:
    """Where the kernels' files are that a file imports: beside it, or, of a user's file, here."""
    return file.parent if (file.parent / Path(__file__).name).exists() else Path(__file__).parent


@functools.cache
def _read(file: Path) -> tuple[bytes, dict[Path, set[str]]]:
    """A file's sha256; and the kernels' files that it imports, and which names of each. Read once for a process."""
    text, folder = file.read_bytes(), _folder(file)
    found: dict[Path, set[str]] = {}
    for module, listed, whole in _IMPORT.findall(text.decode(errors="replace")):
        if whole:
            module = listed = whole
        names = {words.split()[0] for words in listed.strip("()").split(",") if words.strip()}
        for of, taken in {module: names}.items() if module else {name: {name} for name in names}.items():
            if (path := folder / f"{of}.py").exists():
                found.setdefault(path, set()).update(taken)
    return hashlib.sha256(text).digest(), found


def _reached(file: Path, follow: Callable[[dict[Path, set[str]]], bool]) -> list[Path]:
    """A file, its parts, and what they import, and that imports, as far as ``follow`` takes it by its imports."""
    found, waiting = {file}, [file]
    while waiting:
        at = waiting.pop()
        new = {p for p in (*parts_of(at), *_read(at)[1]) if p not in found and follow(_read(p)[1])}
        found |= new
        waiting += new
    return sorted(found, key=lambda path: path.name)  # wherever they are


def launching(file: Path) -> list[Path]:
    """The files that decide what a kernel's file launches: itself, and, of its parts and of what it imports, those with
    device code or with configurations. What else is called beside a kernel does not change its time; nor does this
    file, which finds configurations and chooses none.
    """

    def launches(imports: dict[Path, set[str]]) -> bool:
        names = {path.stem: names for path, names in imports.items()}
        return "_config" in names or "jit" in names.get("_triton", ())

    return _reached(file, launches)


def parts_of(file: Path) -> list[Path]:
    """A kernel's file, and those that it is divided into: ``_attention_triton.py`` is a part of ``attention.py``."""
    return [file, *sorted(file.parent.glob(f"_{file.stem}_*.py"))]


def source_of(file: Path) -> str:
    """sha256 of all that an op's file computes with, hex: itself, its parts, and the kernels' files they import."""
    return _sha256(_reached(file, lambda imports: True))


def _sha256(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(_read(file)[0] for file in files)).hexdigest()


SPACES: dict[str, Space] = {}


def shown(config: Mapping[str, int]) -> str:
    """A configuration in one line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def forget() -> None:
    """Look everything up again: what is tuned has changed."""
    for space in SPACES.values():
        space._kept.clear()


@contextlib.contextmanager
def listening() -> Iterator[dict[Space, dict[tuple[Any, ...], None]]]:
    """Within, what launches ask for is noted: space → keys. It fills while the block runs."""
    found: dict[Space, dict[tuple[Any, ...], None]] = {space: {} for space in SPACES.values()}
    for space in found:
        space._kept.clear()
        space.asked = found[space]
    try:
        yield found
    finally:
        for space in found:
            space.asked = None


def crowded(elements: float, warps: int, most: int = REGISTERS) -> str | None:
    """Why a program cannot hold so many 4-byte values in the registers of its threads; None: it can."""
    each = math.ceil(elements / (32 * warps))
    return f"{each} values for each thread; {most} registers" if each > most else None


def padded(size: int, block: int) -> float:
    """By what factor tiles of ``block`` exceed ``size``."""
    return math.ceil(size / block) * block / size if size else 1.0
