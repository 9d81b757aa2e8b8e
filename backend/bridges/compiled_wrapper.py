"""``torch.compile(model)`` returns a wrapper. transformers' Trainer reads the columns it needs from the signature of ``forward``, which the wrapper
hides ("No columns in the dataset match"); TRL's trainers replace ``forward`` on the wrapper and call the model inside, so that nothing is compiled
and nobody is told.

Here every trainer's ``__init__`` puts the model itself in the wrapper's place, compiled in place by the wrapper's own context (the same backend, mode,
options, dynamic, fullgraph), which is what ``model.compile(...)`` does. It does so for each argument that is such a wrapper (``model``,
``ref_model``, ...), for a PEFT model around one, and only where the wrapper's backend is fastft.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import torch

from fastft import _torch_compat as compat
from fastft.bridges._bridge import StayOut, attribute
from fastft.bridges._tracing import is_fastft

_DONE = "_fastft_unwraps"


def unwrap(value: Any) -> Any:
    """``value``, or, if it is a ``torch.compile`` wrapper of fastft's, its module, compiled in place. Idempotent; lists are looked into."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.nn.Module) for v in value):
        return type(value)(unwrap(v) for v in value)
    if not isinstance(value, torch.nn.Module):
        return value
    context = compat.wrapper_context(value)
    if context is not None and is_fastft(context.callback):
        module = unwrap(value._orig_mod)
        # What Module.compile() sets; this context is what it would make, with all that torch.compile was asked for.
        module._compiled_call_impl = context(module._call_impl)
        return module
    if hasattr(value, "peft_config") and hasattr(value, "get_base_model"):
        # get_peft_model(torch.compile(model)): the tuner holds the wrapper, and TRL would replace forward on it.
        tuner = value.base_model
        inner = getattr(tuner, "model", None)
        if isinstance(inner, torch.nn.Module) and unwrap(inner) is not inner:
            tuner.model = unwrap(inner)
    return value


def apply(module: ModuleType) -> None:
    """Wrap ``__init__`` of ``transformers.Trainer``, of the subclasses there are, and of those to come."""
    trainer: Any = attribute(module, "Trainer")
    parameters = tuple(inspect.signature(trainer.__init__).parameters)
    if parameters[:2] != ("self", "model"):
        raise StayOut(f"Trainer.__init__ takes {', '.join(parameters[:2])}, ... where self, model, ... was expected")
    _wrap_tree(trainer)
    inherited = trainer.__init_subclass__

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        inherited.__func__(cls, **kwargs) if hasattr(inherited, "__func__") else inherited(**kwargs)
        _wrap(cls)

    trainer.__init_subclass__ = classmethod(__init_subclass__)


def _wrap_tree(cls: type) -> None:
    _wrap(cls)
    for subclass in cls.__subclasses__():
        _wrap_tree(subclass)


def _wrap(cls: type) -> None:
    stock: Any = cls.__dict__.get("__init__")
    if stock is None or hasattr(stock, _DONE):
        return

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *(unwrap(a) for a in args), **{k: unwrap(v) for k, v in kwargs.items()})

    setattr(__init__, _DONE, True)
    cls.__init__ = __init__  # type: ignore[misc]
