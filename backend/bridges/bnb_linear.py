"""``bitsandbytes.matmul_4bit``, the product of every ``Linear4bit``, ends in an autograd.Function where a gradient is
wanted. Dynamo traces the forward and the backward of each into graphs of their own, layer by layer, which takes
long.

While fastft traces, such a call is one node in the graph, :func:`linear_4bit`, of tensors and constants. What runs in
it is bitsandbytes' own function, over a quantisation state put together again. So a site that no rule replaces (another
quantisation, a pattern switched off) computes what it would without this bridge, and so do its gradients.

Only the way through the autograd.Function is replaced; the others (no gradient wanted, weights stored as [K, N] or in
the CPU's own format, ``out=``) are traced as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from fastft.bridges._bridge import StayOut, attribute
from fastft.bridges._tracing import tracing

ARGUMENTS = ("A", "B", "quant_state", "out", "bias")
#: What a ``QuantState`` holds.
STATE = {"absmax", "shape", "code", "dtype", "blocksize", "quant_type", "offset", "state2", "nested"}
#: module path in bitsandbytes → lines that the bridge relies on.
LINES = {
    "autograd._functions.matmul_4bit": (
        'if A.device.type == "cpu" and getattr(quant_state, "packing_format_for_cpu", False):',
        "if K == quant_state.shape[0] and K != quant_state.shape[1]:",
        "needs_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))",
        "return MatMul4Bit.apply(A, B, out, bias, quant_state)",
    ),
    "nn.modules.Linear4bit.forward": ("bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=quant_state)",),
}


@torch.compiler.allow_in_graph
def linear_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
    blocksize2: int,
    quant_type: str,
    dtype: torch.dtype,
    version: str,
) -> torch.Tensor:
    """``x`` Wᵀ + ``bias`` as ``bitsandbytes.matmul_4bit`` computes it, gradients of ``x`` and ``bias`` included:
    ``x`` [..., K], ``bias`` [N] or None, both in the dtype of the result, [..., N].

    The rest is W's ``QuantState``: ``packed`` [N * K / 2, 1], ``shape`` (N, K), ``quant_type`` ``"nf4"`` or ``"fp4"``,
    ``dtype`` that of the weight before it was quantised. ``absmax`` fp32 [blocks], or, quantised itself, uint8 [blocks]
    with ``absmax_code`` fp32 [256], ``absmax_offset`` fp32 [], ``absmax2`` fp32 [blocks / ``blocksize2``]. ``version``
    is bitsandbytes': torch's caches know this function by its name, and its result by that of its arguments.
    """
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    second = None
    if absmax_code is not None:
        second = QuantState(absmax2, code=absmax_code, blocksize=blocksize2, dtype=torch.float32)
    state = QuantState(
        absmax,
        shape=torch.Size(shape),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        offset=absmax_offset,
        state2=second,
    )
    # Outside of Dynamo, where this body runs, that is the function as it came.
    return bitsandbytes.matmul_4bit(x, packed, state, bias=bias)


def flat(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, state: Any, version: str) -> torch.Tensor:
    """:func:`linear_4bit` of a weight with this ``QuantState``."""
    second = state.state2
    code, absmax2, blocksize2 = (None, None, 256) if second is None else (second.code, second.absmax, second.blocksize)
    quant = (state.absmax, code, state.offset, absmax2, state.shape, state.blocksize, blocksize2)
    return linear_4bit(x, packed, bias, *quant, state.quant_type, state.dtype, version)


def apply(module: ModuleType) -> None:
    """Put a stand-in for ``matmul_4bit`` into ``bitsandbytes`` and ``bitsandbytes.autograd._functions``."""
    stock: Any = attribute(module, "matmul_4bit")
    version = str(attribute(module, "__version__"))
    check(module)

    @functools.wraps(stock)
    def matmul_4bit(
        A: torch.Tensor,
        B: torch.Tensor,
        quant_state: Any,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if tracing() and out is None and _is_known(A, bias, quant_state):
            return flat(A, B, bias, quant_state, version)
        return stock(A, B, quant_state, out, bias)

    module.matmul_4bit = module.autograd._functions.matmul_4bit = matmul_4bit  # type: ignore[attr-defined]


def _is_known(x: torch.Tensor, bias: torch.Tensor | None, state: Any) -> bool:
    """Whether bitsandbytes would call its autograd.Function, and that would not raise."""
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if state is None or len(state.shape) != 2 or x.shape[-1] != state.shape[1]:
        return False
    if state.state2 is not None and (state.state2.blocksize != 256 or state.state2.dtype != torch.float32):
        return False
    return not (x.device.type == "cpu" and getattr(state, "packing_format_for_cpu", False))


def check(module: ModuleType) -> None:
    """Raise :class:`StayOut` unless ``matmul_4bit`` is called, takes the ways, and has the results and gradients, that
    the bridge is made for.
    """
    stock: Any = attribute(module, "matmul_4bit")
    found = tuple(inspect.signature(stock).parameters)
    if found != ARGUMENTS:
        raise StayOut(f"matmul_4bit takes {', '.join(found)} where {', '.join(ARGUMENTS)} was expected")
    for path, lines in LINES.items():
        source = inspect.getsource(attribute(module, path))  # type: ignore[arg-type]
        for line in lines:
            if line not in source:
                raise StayOut(f"{path} has no `{line}` any more")
    # bitsandbytes may be imported anywhere: while a model is built on the meta device, in inference mode.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        for state in _states(module):
            _check_numbers(module, stock, state)


def _states(module: ModuleType) -> Iterator[Any]:
    """The quantisation state of a weight [6, 64] in blocks of 64, with plain and with quantised scales."""
    make: Any = attribute(module, "functional.QuantState")
    kind = {"shape": torch.Size((6, 64)), "blocksize": 64, "quant_type": "nf4", "dtype": torch.float32}
    yield make(torch.arange(1, 7, dtype=torch.float32), **kind)
    code = torch.linspace(-1, 1, 256, dtype=torch.float32)
    second = make(torch.full((1,), 3.0, dtype=torch.float32), code=code, blocksize=256, dtype=torch.float32)
    absmax = torch.arange(0, 240, 40, dtype=torch.uint8)
    yield make(absmax, offset=torch.tensor(4.0, dtype=torch.float32), state2=second, **kind)


def _check_numbers(module: ModuleType, stock: Any, state: Any) -> None:
    if set(vars(state)) != STATE:
        raise StayOut(
            f"QuantState holds {', '.join(sorted(vars(state)))} where {', '.join(sorted(STATE))} was expected"
        )
    packed = (torch.arange(192, dtype=torch.int64) * 37 % 256).to(torch.uint8).view(-1, 1)
    weight = attribute(module, "functional.dequantize_4bit")(packed, state)  # type: ignore[operator]
    dy = torch.linspace(-1, 1, 18, dtype=torch.float32).view(3, 6)

    def run(call: Any) -> tuple[torch.Tensor, ...]:
        x = torch.linspace(-2, 1, 192, dtype=torch.float32).view(3, 64).requires_grad_()
        bias = torch.linspace(0, 1, 6, dtype=torch.float32).requires_grad_()
        y = call(x, bias)
        return (y, *torch.autograd.grad(y, (x, bias), dy))

    theirs = run(lambda x, bias: stock(x, packed, state, bias=bias))
    again = run(lambda x, bias: flat(x, packed, bias, state, ""))
    dense = run(lambda x, bias: torch.nn.functional.linear(x, weight, bias))
    for name, wanted, same, close in zip(("result", "dx", "dbias"), theirs, again, dense, strict=True):
        if not torch.equal(wanted, same):
            raise StayOut(f"matmul_4bit's {name} is another with a quantisation state that was put together again")
        if not torch.allclose(wanted, close, atol=1e-4):
            raise StayOut(f"matmul_4bit's {name} is not that of a linear layer over the dequantised weight")
