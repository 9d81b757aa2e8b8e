"""``torch.compile(model)`` returns a wrapper. transformers' Trainer reads the columns it needs from the signature of
``forward``, which the wrapper hides ("No columns in the dataset match"); TRL's trainers replace ``forward`` on the
wrapper and call the model inside, so that nothing is compiled and nobody is told; PEFT takes the wrapper for a model
that it does not know, and puts adapters on the head.

Here the ``__init__`` of every trainer and of every PEFT model puts the model itself in the wrapper's place, compiled
in place by the wrapper's own context (the same backend, mode, options, dynamic, fullgraph), which is what
``model.compile(...)`` does. It does so for each argument that is such a wrapper (``model``, ``ref_model``, ...), and
only where the wrapper's backend is fastft.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastft import _torch_compat as compat
from fastft.bridges._bridge import StayOut, attribute, note
from fastft.bridges._tracing import is_fastft

_log = logging.getLogger("fastft")
#: module → the class whose constructors, and those of its subclasses, take a model.
OWNERS = {"transformers.trainer": "Trainer", "peft.peft_model": "PeftModel"}
_DONE = "_fastft_unwraps"


def unwrap(value: Any) -> Any:
    """``value``, or, if it is a ``torch.compile`` wrapper of fastft's, the module in it, compiled in place. Looks into
    lists and tuples. What cannot be unwrapped is left as it is, with a warning.
    """
    try:
        return _unwrap(value)
    except Exception as error:  # inside of a trainer's constructor
        what = "a compiled model stays in its wrapper: use model.compile(backend='fastft'), which makes none"
        _log.warning("%s: %s: %s", what, type(error).__name__, error, exc_info=True)
        note(f"bridge compiled_wrapper: {what}: {type(error).__name__}: {error}")
        return value


def _context(value: Any) -> Any:
    """What compiles a ``torch.compile`` wrapper of fastft's; None of anything else."""
    context = compat.wrapper_context(value) if isinstance(value, torch.nn.Module) else None
    return context if context is not None and is_fastft(context.callback) else None


def _unwrap(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(_unwrap(v) for v in value)
    context = _context(value)
    if context is None:
        return value
    module = _unwrap(value._orig_mod)
    # What Module.compile() sets; the context is what it would make, with all that torch.compile was asked for.
    module._compiled_call_impl = context(module._call_impl)
    return module


def apply(module: ModuleType) -> None:
    """Wrap ``__init__`` of ``module``'s class of :data:`OWNERS`, of the subclasses there are, and of those to come."""
    owner: Any = attribute(module, OWNERS[module.__name__])
    parameters = tuple(inspect.signature(owner.__init__).parameters)
    if parameters[:2] != ("self", "model"):
        raise StayOut(
            f"{owner.__name__}.__init__ takes {', '.join(parameters[:2])}, ... where self, model, ... was expected"
        )
    if "__init_subclass__" in owner.__dict__:
        raise StayOut(f"{owner.__name__} has an __init_subclass__ of its own")
    _lay(owner, unwrap)


def refuse(module: ModuleType, why: str) -> None:
    """In the bridge's absence: a wrapper of fastft's is an error that says what to use."""
    owner: Any = attribute(module, OWNERS[module.__name__])

    def refused(value: Any) -> Any:
        if type(value) in (list, tuple):
            for one in value:
                refused(one)
        elif _context(value) is not None:
            raise RuntimeError(
                f"{owner.__name__} was given a torch.compile wrapper, which it would train uncompiled or not at all "
                f"(fastft's bridge compiled_wrapper is not there: {why}). Compile the model in place: "
                f"model.compile(backend='fastft'), where now torch.compile(model, backend='fastft') is"
            )
        return value

    _lay(owner, refused)


def _lay(owner: Any, change: Callable[[Any], Any]) -> None:
    """Change what the constructors are given, of ``owner``, of the subclasses there are, and of those to come."""
    _wrap_tree(owner, change)

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        super(owner, cls).__init_subclass__(**kwargs)
        _wrap(cls, change)

    if "__init_subclass__" not in owner.__dict__:
        owner.__init_subclass__ = classmethod(__init_subclass__)
    if hasattr(owner, "call_model_init"):
        # Trainer(model_init=...): the model comes from this method.
        stock = owner.call_model_init
        owner.call_model_init = functools.wraps(stock)(lambda *args, **kwargs: change(stock(*args, **kwargs)))


def _wrap_tree(cls: Any, change: Callable[[Any], Any]) -> None:
    _wrap(cls, change)
    for subclass in cls.__subclasses__():
        _wrap_tree(subclass, change)


def _wrap(cls: Any, change: Callable[[Any], Any]) -> None:
    stock: Any = cls.__dict__.get("__init__")
    if stock is None or hasattr(stock, _DONE):
        return

    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        stock(*(change(a) for a in args), **{k: change(v) for k, v in kwargs.items()})

    setattr(wrapped, _DONE, True)
    cls.__init__ = wrapped
