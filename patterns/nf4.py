"""Linear layers over NF4 weights, as bitsandbytes' ``Linear4bit`` traces. Four forms::

    gemm_4bit(x, packed, ...)                             bitsandbytes ≥ 0.50, x does not require a gradient
    linear_4bit(x, packed, ...)                           x requires one; :mod:`fastft.bridges.bnb_linear`
    autograd_function_apply(forward, backward, ...)[0]    gemm_4bit inside ``forward``: the same without that bridge
    linear(x, dequantize_4bit(packed, ...))               older versions and hand-written code, with any transposes

(the last also inside the third). :func:`read` tells what each of them says; the LoRA rules use it too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastft.bridges.bnb_linear import linear_4bit
from fastft.kernels.lora_linear import OP as LORA_LINEAR
from fastft.patterns._match import (
    Bindings,
    Match,
    Pattern,
    Reason,
    Rewrite,
    Table,
    dtype,
    is_noop,
    is_widening,
    row,
    see,
    through,
    use,
    value,
)

_ARGUMENTS = {
    "gemm_4bit": (
        *("A", "B", "shapeB", "absmax", "blocksize", "quant_type"),
        *("bias", "absmax_8bit", "absmax_code", "absmax_offset"),
    ),
    "dequantize_4bit": ("A", "absmax", "blocksize", "quant_type", "shape", "dtype"),
    "dequantize_blockwise": ("A", "absmax", "code", "blocksize", "dtype"),
}
_BRIDGED = tuple(inspect.signature(linear_4bit).parameters)
_PREFIX = "bitsandbytes."


@dataclass(frozen=True)
class QuantizedLinear:
    """x Wᵀ + bias with an NF4 weight: nodes and numbers, as :func:`fastft.kernels.lora_linear.lora_linear` takes them.

    ``inside``: the nodes it consists of.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    quant: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    blocksize: int
    blocksize2: int
    inside: frozenset[fx.Node]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments that describe the weight."""
        return {
            "quant": list(self.quant),
            "shape": self.shape,
            "blocksize": self.blocksize,
            "blocksize2": self.blocksize2,
        }


def exact_source(node: Any, to: Any) -> Any:
    """The first ancestor of ``node``, through casts and no-ops, that gives the same numbers when cast to ``to``."""
    while isinstance(node, fx.Node):
        seen = see(node)
        if not (is_noop(seen) or is_widening(seen) or (seen.op == "cast" and seen.args[1] == to)):
            break
        node = seen.args[0]
    return node


def bitsandbytes_op(node: Any) -> str | None:
    """Name of the bitsandbytes op that a node calls (``"gemm_4bit"``), or None. The library need not be there."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name = str(node.target)
    return name.removeprefix(_PREFIX).split(".")[0] if name.startswith(_PREFIX) else None


def read(node: Any) -> QuantizedLinear | Reason | None:
    """What the quantised linear layer ending at ``node`` says; a reason where it is of another kind, else None."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is linear_4bit:
        return _bridged(node)
    call = _function_apply(node)
    if call is not None:
        inside, result, outer = _body(call)
        found = _plain(result, outer)
        if found is None and any(dtype(operand) == torch.int8 for operand in outer.values()):
            return Reason("quantization", "the weight is quantised as int8; NF4 is supported")
        if not isinstance(found, QuantizedLinear):
            return found
        return replace(found, inside=inside | {node})
    return _plain(node, {})


def _bridged(node: fx.Node) -> QuantizedLinear | Reason:
    got: dict[str, Any] = dict(zip(_BRIDGED, node.args, strict=True))
    scales: tuple[Any, ...] = (got["absmax"],)
    if got["absmax_code"] is not None:
        scales = (got["absmax"], got["absmax_code"], got["absmax_offset"], got["absmax2"])
    sizes = got["shape"], got["blocksize"], got["blocksize2"]
    return _linear(got["x"], got["packed"], got["bias"], scales, *sizes, got, node)


def _function_apply(node: fx.Node) -> fx.Node | None:
    """The autograd.Function in the graph whose first output ``node`` is."""
    seen = see(node)
    call = seen.args[0] if seen.op == "getitem" and seen.args[1] == 0 else node
    if not isinstance(call, fx.Node) or getattr(call.target, "__name__", "") != "autograd_function_apply":
        return None
    # One output may come as it is, or as a tuple of one: the item is the anchor then.
    return call if isinstance(value(node), torch.Tensor) else None


def _body(call: fx.Node) -> tuple[frozenset[fx.Node], Any, dict[fx.Node, Any]]:
    """The call itself, the first output inside its forward, and what the forward's placeholders stand for outside."""
    owner: Any = call.graph.owning_module
    graph = getattr(owner, str(call.args[0].target)).graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    outer = dict(zip(placeholders, call.args[2:], strict=True))
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    while isinstance(result, (tuple, list)) and result:
        result = result[0]
    return frozenset({call}), result, outer


def _plain(node: Any, outer: dict[fx.Node, Any]) -> QuantizedLinear | Reason | None:
    node = through(node, "noop") if outer else node
    name = bitsandbytes_op(node)
    if name == "gemm_4bit":
        got = _arguments(node, name, outer)
        scales: tuple[Any, ...] = (got["absmax"],)
        if got["absmax_8bit"] is not None:
            scales = (got["absmax_8bit"], got["absmax_code"], got["absmax_offset"], got["absmax"])
        return _linear(got["A"], got["B"], got["bias"], scales, got["shapeB"], got["blocksize"], 256, got, node)
    if name is not None and (name.startswith("gemv") or "int8" in name):
        return Reason("quantization", f"bitsandbytes.{name} has no form that trains over NF4 weights")
    seen = see(node)
    if seen.op != "linear":
        return None
    x, weight, bias = seen.args
    dequantise, turns = _untransposed(weight)
    if bitsandbytes_op(dequantise) != "dequantize_4bit":
        return None
    if turns % 2:
        return Reason("quantization", "the quantised weight is stored as [K, N]; [N, K] is supported")
    got = _arguments(dequantise, "dequantize_4bit", outer)
    scales, blocksize2 = _scales(dequantise.args[1], outer)
    if not scales:
        return Reason("quantization", "the scales of the quantised weight come from something unknown")
    x, bias = _outside(x, outer), _outside(bias, outer)
    # The dequantised weight is not part of the site: whoever else reads it keeps it.
    return _linear(x, got["A"], bias, scales, got["shape"], got["blocksize"], blocksize2, got, node)


def _linear(
    x: Any, packed: Any, bias: Any, scales: Any, sizes: Any, blocksize: Any, blocksize2: Any, got: Any, *inside: fx.Node
) -> QuantizedLinear | Reason:
    if got["quant_type"] != "nf4":
        return Reason("quantization", f"the weight is quantised as {got['quant_type']}; NF4 is supported")
    packed = through(packed, "view", "noop")
    nodes = (x, packed, *scales)
    if not all(isinstance(n, fx.Node) for n in nodes) or not all(isinstance(s, int) for s in (*sizes, blocksize)):
        return Reason("quantization", "the quantised weight is computed inside the layer or has symbolic sizes")
    return QuantizedLinear(x, packed, bias, tuple(scales), tuple(sizes), blocksize, blocksize2, frozenset(inside))


def _arguments(node: fx.Node, name: str, outer: dict[fx.Node, Any]) -> dict[str, Any]:
    """A bitsandbytes call's arguments by name, as values of the outer graph."""
    names = _ARGUMENTS[name]
    got = dict.fromkeys(names) | dict(zip(names, node.args, strict=False)) | node.kwargs
    return {k: _outside(v, outer) for k, v in got.items()}


def _outside(found: Any, outer: dict[fx.Node, Any]) -> Any:
    """``found``, a value inside a function's body, as one of the outer graph; None for one that is computed inside."""
    if not outer or not isinstance(found, fx.Node):
        return found
    found = through(found, "view", "noop")
    return outer.get(found)


def _untransposed(weight: Any) -> tuple[Any, int]:
    """A weight without transposes and exact casts, and the number of transposes."""
    turns = 0
    while isinstance(weight, fx.Node):
        seen = see(weight)
        if is_noop(seen) or seen.op == "cast":
            weight = seen.args[0]
        elif (weight.op == "call_method" and weight.target == "t") or seen.op in ("transpose", "permute"):
            weight, turns = weight.args[0], turns + 1
        else:
            break
    return weight, turns


def _scales(absmax: Any, outer: dict[fx.Node, Any]) -> tuple[tuple[Any, ...], int]:
    """``absmax``, or what it is decoded from by ``dequantize_blockwise(...) + offset``; empty when that is unknown.

    And the second blocksize. An offset added in place leaves the decoded scales in the graph: they are what is read.
    """
    seen = see(absmax)
    if seen.op == "add" or (seen.op == "in_place" and outer):
        inner, offset = seen.args[:2]
        if bitsandbytes_op(offset) == "dequantize_blockwise":
            inner, offset = offset, inner
        if bitsandbytes_op(inner) != "dequantize_blockwise":
            return (), 0
        got = _arguments(inner, "dequantize_blockwise", outer)
        return (got["A"], got["code"], _outside(offset, outer), got["absmax"]), got["blocksize"]
    found = _outside(absmax, outer)
    return (() if found is None else (found,)), 256


class Nf4Linear(Pattern):
    """A quantised linear layer in any of its forms, bound to ``name`` as what :func:`read` says."""

    anchors = frozenset({"unknown", "getitem", "linear"})

    def __init__(self, name: str) -> None:
        self.name = name

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        layer = read(found)
        if layer is None:
            return
        more = bound.bind(self.name, layer)
        if more is None:
            return
        for node in layer.inside if isinstance(layer, QuantizedLinear) else (found,):
            more = more.take(node)
        yield more


def _build(m: Match) -> Rewrite | Reason | None:
    layer = m["layer"]
    if isinstance(layer, Reason):
        return layer
    to = dtype(m.anchor)
    return use(LORA_LINEAR.name, exact_source(layer.x, to), layer.weight, layer.bias, **layer.kwargs, dtype=to)


def _seed(node: fx.Node) -> str | None:
    name = bitsandbytes_op(node)
    if name is not None and (name.startswith("gem") or "int8" in name):
        return f"bitsandbytes.{name}"
    if node.target is linear_4bit:
        return "bitsandbytes.matmul_4bit"
    call = _function_apply(node)
    inner = None if call is None else bitsandbytes_op(_body(call)[1])
    return None if inner is None else f"bitsandbytes.{inner} in an autograd.Function"


TABLE = Table("nf4", (row(Nf4Linear("layer"), _build),), _seed)  # x · NF4(packed)ᵀ + bias
