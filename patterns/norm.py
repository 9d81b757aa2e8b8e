"""RMSNorm, as transformers spells it.

All orderings have in common ``x̂ = x · rsqrt(mean(x²) + ε)`` in fp32; they differ in where the cast back and the weight stand.
"""

from __future__ import annotations

from typing import Any

from torch import fx

import fastft.kernels.rms_norm  # noqa: F401  (registers the op)
from fastft.patterns._match import Match, Reason, Rewrite, Table, Var, cast, const, down, dtype, number, op, rank, row, see, shape, through, use

x = Var("x")
weight = Var("weight", lambda n: rank(n) == 1)
x32 = cast(x)
normed = x32 * op("rsqrt", op("add", op("mean_last", op("square", x32)), number("eps")))


def _rms_norm(offset: float) -> Any:
    def build(m: Match) -> Rewrite | Reason | None:
        w = m.get("weight")
        # x is bound on the wide side of its own upcast: the op reads the narrow one and widens by itself.
        source = through(m["x"], "noop", "widen")
        w = through(w, "noop", "widen")
        if w is not None and shape(w) != shape(source)[-1:]:
            return None
        return use("rms_norm", source, w, m["eps"], offset, dtype(m.anchor))

    return build


def _seed(node: fx.Node) -> str | None:
    seen = see(node)
    if seen.op == "rsqrt":
        return "rsqrt of " + see(through(seen.args[0], "noop", "cast", "add")).op
    return None


TABLE = Table(
    "rms_norm",
    (
        row(down(cast(weight) * cast(normed)), _rms_norm(0.0)),  # w · x̂, cast before or after w (Llama, Qwen, Mistral, gpt-oss, Llama 4)
        row(down(cast(normed) * (const(1.0) + cast(weight))), _rms_norm(1.0)),  # (1 + w) · x̂ (Gemma)
        row(down(normed), _rms_norm(0.0)),  # x̂ (Llama 4's L2Norm)
    ),
    _seed,
)
