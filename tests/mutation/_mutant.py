"""A mistake that the ordinary tests must notice: the class, for the lists of them."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A name; the file; a piece of its text that occurs once; what stands there in the mutant; the tests that must fail
    (arguments of pytest); and, for mistakes inside kernels, that they run in Triton's interpreter.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    interpret: bool = False
