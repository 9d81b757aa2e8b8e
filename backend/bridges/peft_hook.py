"""``enable_input_require_grads`` hangs a hook on the embedding that calls ``output.requires_grad_(True)``.

It is there for reentrant checkpointing, which gives no gradient to anything inside when none of its inputs needs one:
with a frozen embedding, as in every PEFT run. Dynamo cannot trace the call (or cannot let the tensor leave the graph),
so the graph is split behind the embedding and every frame around it is traced again.

While fastft traces, the hook returns the same values as the output of an ``autograd.Function`` of which one input does
need a gradient. So what follows still sees an input that needs a gradient, also where a checkpointed layer cannot be
traced and runs in eager. That function's backward returns nothing, so what was computed only to reach the embedding is
dead code in the backward graph.

The hooks are closures, and most are registered before anybody calls ``torch.compile``. All of them share the code
object that lies in their library's function, so that is what is exchanged: there for the hooks to come, and in the
hooks that exist.
"""

from __future__ import annotations

import gc
import inspect
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from fastft.bridges._bridge import NotNeeded, StayOut, attribute
from fastft.bridges._tracing import tracing

#: module → the functions in which a hook is defined.
OWNERS = {
    "transformers.modeling_utils": ("PreTrainedModel.enable_input_require_grads",),
    "peft.peft_model": ("PeftModel._prepare_model_for_gradient_checkpointing",),
    "peft.mixed_model": ("_prepare_model_for_gradient_checkpointing",),
    "peft.utils.other": ("prepare_model_for_kbit_training",),
}

#: device → a scalar leaf that needs a gradient and never gets one.
_LEAVES: dict[str, torch.Tensor] = {}


class _WithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None


@torch.compiler.allow_in_graph
def with_grad(x: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """``x``, any shape, but needing a gradient because ``leaf`` does; neither of them gets one. One node in the graph,
    and no work.
    """
    return _WithGrad.apply(x, leaf)


# Dynamo runs this for real while it traces, so that the leaf exists by the time that the traced code looks it up.
@torch.compiler.assume_constant_result
def _leaf_key(device: torch.device) -> str:
    key = str(device)
    if key not in _LEAVES:
        _LEAVES[key] = torch.zeros((), device=device, requires_grad=True)
    return key


def require_grad(output: torch.Tensor) -> torch.Tensor | None:
    """What the hook does now. A hook that returns None leaves the module's output as it is."""
    if not tracing():
        output.requires_grad_(True)
        return None
    if output.requires_grad or not torch.is_grad_enabled():
        return None
    key = _leaf_key(output.device)
    return with_grad(output, _LEAVES[key])


def _hook(module, input, output):  # type: ignore[no-untyped-def]
    # Runs with the globals of the library in which the hook was defined, so it can use none of this module's.
    from fastft.bridges.peft_hook import require_grad

    return require_grad(output)


def apply(module: ModuleType) -> None:
    """Exchange the hook's code in ``module``'s functions of :data:`OWNERS`, and in the hooks that were made from it."""
    exchanged = []
    for path in OWNERS[module.__name__]:
        owner = inspect.unwrap(attribute(module, path))  # type: ignore[arg-type]
        if not isinstance(owner, FunctionType):
            raise StayOut(f"{path} is not a Python function")
        nested = [c for c in owner.__code__.co_consts if isinstance(c, CodeType)]
        if not any("requires_grad_" in code.co_names for code in nested):
            raise NotNeeded(f"{path} hangs up no hook that calls requires_grad_")
        hooks = [code for code in nested if is_known_hook(code)]
        if len(hooks) != 1:
            raise StayOut(f"the hook in {path} does not just call output.requires_grad_(True)")
        (old,) = hooks
        new = _hook.__code__.replace(co_name=old.co_name)
        exchanged.append((owner, old, new))
    for owner, old, new in exchanged:
        owner.__code__ = owner.__code__.replace(
            co_consts=tuple(new if c is old else c for c in owner.__code__.co_consts)
        )
        for function in gc.get_referrers(old):
            if isinstance(function, FunctionType) and function.__code__ is old:
                function.__code__ = new


def is_known_hook(code: CodeType) -> bool:
    """Whether ``code`` is ``def hook(module, input, output): output.requires_grad_(True)`` and nothing more."""
    return (
        code.co_argcount == 3
        and code.co_names == ("requires_grad_",)
        and len(code.co_varnames) == 3
        and not code.co_freevars
        and set(code.co_consts) <= {None, True}
    )
