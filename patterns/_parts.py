"""Parts of a tensor's last axis, however they are spelled: slices, ``chunk``, ``split``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx

from fastft.patterns._match import Bindings, Pattern, rank, see, shape, through, value


class Piece(NamedTuple):
    """``source[..., start:stop:step]``, with the numbers as Python's ``slice.indices`` gives them; ``width`` is the
    source's."""

    source: fx.Node
    start: int
    stop: int
    step: int
    width: int


def piece(node: Any) -> Piece | None:
    """What part of which tensor ``node`` is; None when it is no part along the last axis, or sizes are symbolic."""
    seen = see(through(node, "noop"))
    if seen.op == "index":
        return _sliced(*seen.args)
    if seen.op != "getitem" or not isinstance(seen.args[1], int):
        return None
    parent = see(seen.args[0])
    if parent.op not in ("chunk", "split"):
        return None
    source, how, dim = parent.args
    width = _width(source)
    if width is None or dim not in (-1, rank(source) - 1):
        return None
    sizes = _sizes(parent.op, value(how), width)
    index = seen.args[1] % len(sizes) if sizes else 0
    if not sizes or seen.args[1] >= len(sizes):
        return None
    start = sum(sizes[:index])
    return Piece(source, start, start + sizes[index], 1, width)


def _width(source: Any) -> int | None:
    sizes = shape(source)
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else None


def _sizes(op: str, how: Any, width: int) -> list[int]:
    """Widths of the pieces that ``chunk`` or ``split`` makes; empty when they cannot be told."""
    if isinstance(how, (tuple, list)):
        sizes = [value(h) for h in how]
        return sizes if all(isinstance(s, int) for s in sizes) else []
    if not isinstance(how, int) or how < 1:
        return []
    each = -(-width // how) if op == "chunk" else how
    return [min(each, width - at) for at in range(0, width, each)] if each else []


def _sliced(source: Any, index: Any) -> Piece | None:
    width = _width(source)
    index = index if isinstance(index, tuple) else (index,)
    last = index[-1] if index else None
    reaches_last = Ellipsis in index[:-1] or len(index) == rank(source)
    others_whole = all(i is Ellipsis or i == slice(None) for i in index[:-1])
    if width is None or not isinstance(last, slice) or not reaches_last or not others_whole:
        return None
    bounds = [value(b) for b in (last.start, last.stop, last.step)]
    if not all(b is None or isinstance(b, int) for b in bounds) or (bounds[2] is not None and bounds[2] < 1):
        return None
    return Piece(source, *slice(*bounds).indices(width), width)


class part(Pattern):
    """A part of the last axis of ``inner``: the one that ``which(width) -> (start, stop, step)`` names."""

    def __init__(self, inner: Pattern, which: Callable[[int], tuple[int, int, int]]) -> None:
        self.inner, self.which = inner, which

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        got = piece(found)
        if got is not None and (got.start, got.stop, got.step) == self.which(got.width):
            yield from self.inner.match(got.source, bound.take(found))


def first_half(width: int) -> tuple[int, int, int]:
    """``x[..., : width // 2]``"""
    return 0, width // 2, 1


def second_half(width: int) -> tuple[int, int, int]:
    """``x[..., width // 2 :]``"""
    return width // 2, width, 1


def evens(width: int) -> tuple[int, int, int]:
    """``x[..., 0::2]``"""
    return 0, width, 2


def odds(width: int) -> tuple[int, int, int]:
    """``x[..., 1::2]``"""
    return 1, width, 2
