"""What happens when something of fastft's own fails: it is undone, training goes on without it, the report says so.

``options={"strict": True}`` raises :class:`InternalError` instead, from what was raised. Some exceptions are not ours
to catch, strict or not: Ctrl-C and the like; what Dynamo steers by; and running out of memory, on the host or on a GPU,
where whatever is done instead takes more of it, and trainers have a remedy of their own (a smaller batch).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from fastft import _torch_compat as compat

log = logging.getLogger("fastft")


class InternalError(RuntimeError):
    """A step of fastft's own failed (raised under ``strict`` only). ``__cause__`` is what it failed with."""


class Attempt:
    """``with Attempt("planning", "...", errors):`` — what is raised in the block is caught, undone and reported.

    ``what`` was tried, and ``instead`` is what happens now; ``errors`` gets one line for each ``what``, however often
    it fails. ``undo`` puts back what the block may have left half done. ``failed`` is the exception, or None.
    """

    __slots__ = ("errors", "failed", "instead", "strict", "undo", "what")

    def __init__(
        self,
        what: str,
        instead: str,
        errors: list[str],
        strict: bool = False,
        undo: Callable[[], object] | None = None,
    ) -> None:
        self.what, self.instead, self.errors, self.strict, self.undo = what, instead, errors, strict, undo
        self.failed: Exception | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or not is_ours(error):
            return False
        if self.strict:
            raise InternalError(f"{self.what} failed: {said(error)}") from error
        if self.undo is not None:
            self.undo()
        self.failed = error
        if not any(line.startswith(f"{self.what} failed") for line in self.errors):
            log.warning("%s failed, %s: %s", self.what, self.instead, said(error), exc_info=error)
            self.errors.append(f"{self.what} failed, {self.instead}: {said(error)}")
        return True


def is_ours(error: BaseException) -> bool:
    """Whether training may go on behind this exception as if its step had not been tried."""
    passed_on: tuple[type, ...] = (MemoryError, torch.OutOfMemoryError, InternalError, *compat.control_flow())
    return not any(isinstance(e, passed_on) for e in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it was made from, torch's wrappers included."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def said(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
