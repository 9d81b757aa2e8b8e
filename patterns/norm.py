"""RMSNorm and LayerNorm, as PyTorch and transformers spell them.

All orderings of RMSNorm have in common ``x̂ = x / sqrt(mean(x²) + ε)`` in fp32; they differ in where the cast back and
the weight stand. LayerNorm is one call in PyTorch; Cohere writes it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import fastft.kernels.layer_norm
import fastft.kernels.rms_norm  # noqa: F401  (the imports register the ops)
from fastft.patterns._match import (
    Match,
    Pattern,
    Reason,
    Rewrite,
    Table,
    Var,
    alt,
    cast,
    const,
    down,
    dtype,
    number,
    op,
    rank,
    row,
    same_size,
    see,
    shape,
    through,
    use,
    value,
)

x = Var("x")
weight = Var("weight", lambda n: rank(n) == 1)
eps = number("eps")


def _scaled(centred: Pattern) -> Pattern:
    """``c / sqrt(mean(c²) + ε)``, as a product with rsqrt or as a quotient."""
    variance = op("add", op("mean_last", alt(op("square", centred), centred * centred)), eps)
    root = op("sqrt", variance)
    reciprocal = alt(op("rsqrt", variance), op("reciprocal", root), op("div", const(1.0), root))
    return alt(centred * reciprocal, op("div", centred, root))


normed = _scaled(cast(x))
layer_normed = _scaled(op("sub", cast(x), op("mean_last", cast(x))))


def _source(m: Match) -> Any:
    """x as it was before its upcast: the kernel reads the narrow tensor and widens by itself."""
    return through(m["x"], "noop", "widen")


def _weight(m: Match, source: Any) -> Any:
    """The weight before its upcast; None when there is none or it is not one of x's last axis."""
    found = through(m.get("weight"), "noop", "widen")
    return found if found is not None and same_size(shape(found)[0], shape(source)[-1]) else None


def _rms_norm(offset: float) -> Any:
    def build(m: Match) -> Rewrite | Reason | None:
        source = _source(m)
        w = _weight(m, source)
        if w is None and "weight" in m.names:
            return None  # a product with some other vector; x̂ itself is the site
        return use("rms_norm", source, w, m["eps"], offset, dtype(m.anchor))

    return build


def _native_eps(m: Match) -> float:
    """``eps=None`` means the machine epsilon of the dtype that PyTorch computes in."""
    compute = torch.promote_types(dtype(m["x"]) or torch.float32, torch.float32)
    return torch.finfo(compute).eps if m["eps"] is None else m["eps"]


def _one_axis(m: Match) -> Reason | None:
    """A normalised shape of several axes is another reduction."""
    axes = value(m["axes"])
    if isinstance(axes, (tuple, list, torch.Size)) and len(axes) == 1:
        return None
    return Reason("shape", f"normalised over {axes}; the last axis alone is supported")


def _native_rms_norm(m: Match) -> Rewrite | Reason | None:
    w = through(m["weight"], "noop", "widen")
    return _one_axis(m) or use("rms_norm", _source(m), w, _native_eps(m), 0.0, dtype(m.anchor))


def _native_layer_norm(m: Match) -> Rewrite | Reason | None:
    w, b = (through(m[name], "noop", "widen") for name in ("weight", "bias"))
    return _one_axis(m) or use("layer_norm", _source(m), w, b, m["eps"], dtype(m.anchor))


def _written_layer_norm(m: Match) -> Rewrite | Reason | None:
    source = _source(m)
    w = _weight(m, source)
    if w is None and "weight" in m.names:
        return None
    return use("layer_norm", source, w, None, m["eps"], dtype(m.anchor))


def _is_second_moment(node: Any) -> bool:
    """Whether ``node`` is ``mean(something²) + ε`` over the last axis."""
    seen = see(through(node, "noop", "cast"))
    if seen.op != "add":
        return False
    means = [see(through(n, "noop", "cast")) for n in seen.args]
    of = [see(through(m.args[0], "noop", "cast")) for m in means if m.op == "mean_last"]
    return any(m.op == "square" or (m.op == "mul" and m.args[0] is m.args[1]) for m in of)


def _rms_seed(node: fx.Node) -> str | None:
    seen = see(node)
    if seen.op == "rms_norm":
        return "torch.nn.functional.rms_norm"
    if seen.op in ("rsqrt", "sqrt") and _is_second_moment(seen.args[0]):
        return f"{seen.op} of a mean of squares"
    return None


def _layer_norm_seed(node: fx.Node) -> str | None:
    return "torch.nn.functional.layer_norm" if see(node).op == "layer_norm" else None


LAYER_NORM = Table(
    "layer_norm",
    (
        row(op("layer_norm", x, Var("axes"), Var("weight"), Var("bias"), eps), _native_layer_norm),
        row(down(cast(weight) * cast(layer_normed)), _written_layer_norm),  # w · x̂ (Cohere)
        row(down(layer_normed), _written_layer_norm),  # x̂
    ),
    _layer_norm_seed,
)

RMS_NORM = Table(
    "rms_norm",
    (
        row(op("rms_norm", x, Var("axes"), Var("weight"), Var("eps")), _native_rms_norm),
        # (1 + w) · x̂ (Gemma, Qwen3-Next); below, 1 + w would be some vector
        row(down(cast(normed) * (const(1.0) + cast(weight))), _rms_norm(1.0)),
        # w · x̂, the cast before w (Llama, Qwen, Mistral, Llama 4) or after it (gpt-oss, OLMo 2)
        row(down(cast(weight) * cast(normed)), _rms_norm(0.0)),
        row(down(normed), _rms_norm(0.0)),  # x̂ (Llama 4's q and k)
    ),
    _rms_seed,
)

# A LayerNorm that is written out holds an RMSNorm of x − mean(x): it goes first.
TABLES = (LAYER_NORM, RMS_NORM)
