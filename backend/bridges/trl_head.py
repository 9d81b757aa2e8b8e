"""TRL's fused head (``add_fused_lm_head``, TRL >= 1.16) ends in ``_ChunkedLogProbFunction.apply``, which Dynamo cannot
trace (``torch.mm(out=)`` into slices), behind a boolean mask, which splits the graph too. The backbone would be
compiled, and the head would run outside, slowly.

While fastft traces, both names in ``trl.trainer.utils`` lead elsewhere:

* ``_ChunkedLogProbFunction.apply`` is one call of :func:`fastft.kernels.linear_cross_entropy.linear_log_prob`, the
  same maths;
* ``_use_triton`` is False, which is the way TRL itself takes where shapes must not depend on data: every position is
  scored, and those whose label is -100 are filled with 0 afterwards.

Generation, scoring, the reference and training all call the one function that TRL puts in ``model.forward``, each with
fixed lengths first and with changing ones later. That is more than the eight compilations that Dynamo allows one piece
of code: the ninth, which may be training, would run uncompiled. So it is allowed :data:`COMPILATIONS`.

TRL 1.15 knows no such way: there the mask is applied in any case, so this bridge is for 1.16 and later.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch

from fastft import _torch_compat as compat
from fastft.bridges._bridge import StayOut, attribute
from fastft.bridges._tracing import tracing
from fastft.kernels.linear_cross_entropy import linear_log_prob

ARGUMENTS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
#: Four kinds of calls (see above), each with one or several adapters, of fixed or changing lengths, and to spare.
COMPILATIONS = 32
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

torch.compiler.allow_in_graph(linear_log_prob)


def head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What TRL's function returns, from its arguments: ``hidden`` [tokens, hidden], ``weight`` [vocab, hidden],
    ``bias`` [vocab] or None, ``targets`` int64 [tokens]. Returns log-probability, entropy, log Σp², mean logit and
    is-top-1, each [tokens], None where ``outputs`` does not ask for it.
    """
    device = hidden.device.type
    # TRL multiplies in autocast's dtype, or in the hidden states' own; fp32 from there on.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    found = linear_log_prob(
        hidden,
        weight,
        bias,
        targets,
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        temperature=temperature,
        entropy="entropy" in outputs,
        is_top1="is_top1" in outputs,
        mean_logits="mean_logits" in outputs,
        log_sum_sq_probs="log_sum_sq_probs" in outputs,
        dtype=dtype,
    )
    return (
        found.log_prob,
        found.entropy if "entropy" in outputs else None,
        found.log_sum_sq_probs if "log_sum_sq_probs" in outputs else None,
        found.mean_logits if "mean_logits" in outputs else None,
        found.is_top1 if "is_top1" in outputs else None,
    )


def apply(module: ModuleType) -> None:
    """Put stand-ins for the two names into ``trl.trainer.utils``."""
    stock: Any = attribute(module, "_ChunkedLogProbFunction")
    stock_use_triton: Any = attribute(module, "_use_triton")
    check(stock, module)

    class ChunkedLogProbFunction:
        """TRL's function, or ours while fastft traces."""

        @staticmethod
        def apply(*args: Any, **kwargs: Any) -> Any:
            return head(*args, **kwargs) if tracing() else stock.apply(*args, **kwargs)

    def _use_triton(device: torch.device) -> bool:
        return False if tracing() else stock_use_triton(device)

    module._ChunkedLogProbFunction = ChunkedLogProbFunction  # type: ignore[attr-defined]
    module._use_triton = _use_triton  # type: ignore[attr-defined]
    compat.allow_compilations(COMPILATIONS)


def check(stock: Any, module: ModuleType) -> None:
    """Raise :class:`StayOut` unless ``stock`` has the arguments, and on a few numbers the results, of :func:`head`,
    and the caller the branch we use.
    """
    found = tuple(inspect.signature(stock.forward).parameters)
    if found != ARGUMENTS:
        raise StayOut(f"ChunkedLogProbFunction takes {', '.join(found)} where {', '.join(ARGUMENTS)} was expected")
    caller = inspect.getsource(attribute(module, "add_fused_lm_head"))  # type: ignore[arg-type]
    for line in (
        "compact = _use_triton(",
        "labels[mask] if compact else labels.clamp(min=0).reshape(-1)",
        ".masked_fill(~mask, 0)",
    ):
        if line not in caller:
            raise StayOut(f"add_fused_lm_head has no `{line}` any more")
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 4), (5, 4), (5,)))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = (hidden, weight, bias, torch.tensor([0, 4, 2]), 1.5, 2, 3.0, 0.5, OUTPUTS)
        for name, ours, theirs in zip(
            ("log_probs", "entropy", *OUTPUTS[1:]), head(*arguments), stock.apply(*arguments), strict=True
        ):
            if ours is None or theirs is None or not torch.allclose(ours.float(), theirs.float(), atol=1e-5):
                raise StayOut(f"ChunkedLogProbFunction's {name} are not what fastft computes")
