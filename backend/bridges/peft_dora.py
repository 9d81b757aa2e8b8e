"""DoRA reads the base weight through ``peft.utils.integrations.dequantize_module_weight``, which asks for the name of
the module that defines the weight's class. Dynamo cannot trace that, so every adapted layer breaks the graph. And it
empties its cache in every training step, which is a side effect that Dynamo does not allow in a checkpointed layer,
although the cache is empty already.

While fastft traces, a weight that is a plain parameter is returned at once, which is what the function does with it; a
bitsandbytes 4-bit weight is dequantised by the function that PEFT ends up calling; and an empty cache is left alone.
Anything else goes PEFT's way.

Several modules of PEFT hold the function under their own name, so its code is exchanged in place.
"""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType
from typing import Any

import torch

from fastft.bridges._bridge import StayOut, attribute
from fastft.bridges._tracing import tracing

_STOCK: dict[str, Any] = {}


def dequantize(module: torch.nn.Module) -> torch.Tensor:
    """The base weight of ``module`` [out, in], dequantised if it is quantised: what PEFT's function returns."""
    if tracing() and not hasattr(module, "W_q"):
        weight: Any = module.weight
        if type(weight) is torch.nn.Parameter:
            return weight
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight, weight.quant_state)
    return _STOCK["dequantize_module_weight"](module)


def clear(layer: Any) -> None:
    """Empty a DoRA layer's cache, unless that would change nothing."""
    if not (tracing() and not layer._dora_cache):
        _STOCK["_cache_clear"](layer)


def _dequantize_module_weight(module):  # type: ignore[no-untyped-def]
    # Runs with PEFT's globals, so it can use none of this module's.
    from fastft.bridges.peft_dora import dequantize

    return dequantize(module)


def _cache_clear(self):  # type: ignore[no-untyped-def]
    from fastft.bridges.peft_dora import clear

    clear(self)


def apply(module: ModuleType) -> None:
    """Exchange the code of ``dequantize_module_weight`` in ``peft.utils.integrations``, of ``_cache_clear`` in
    ``peft.tuners.lora.dora``.
    """
    if module.__name__ == "peft.tuners.lora.dora":
        cache_clear = attribute(module, "DoraLinearLayer._cache_clear")
        names = getattr(getattr(cache_clear, "__code__", None), "co_names", None)
        if names != ("_dora_cache", "clear"):
            raise StayOut("DoraLinearLayer._cache_clear does not just empty _dora_cache any more")
        _exchange(cache_clear, _cache_clear, "self")
        return
    function: Any = attribute(module, "dequantize_module_weight")
    plain = torch.nn.Linear(2, 2, bias=False)
    if function(plain) is not plain.weight:
        raise StayOut("dequantize_module_weight does not return a plain weight as it is any more")
    _exchange(function, _dequantize_module_weight, "module")


def _exchange(function: Any, replacement: Any, argument: str) -> None:
    """Give ``function``, of one ``argument``, the code of ``replacement``; what it was stays in ``_STOCK``."""
    if (
        not isinstance(function, FunctionType)
        or function.__code__.co_freevars
        or tuple(inspect.signature(function).parameters) != (argument,)
    ):
        raise StayOut(f"{getattr(function, '__qualname__', function)} is not a plain function of {argument} any more")
    _STOCK[function.__name__] = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    function.__code__ = replacement.__code__
