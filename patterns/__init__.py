"""What a site looks like in a Dynamo graph: the matcher, and one table of rules for each family of sites.

``tables()`` lists them in the order in which they are tried: those that consume most come first.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastft.patterns._match import Table

# The loss takes the head's linear with it, LoRA takes the NF4 linear below it, rotary and attention look through
# repeated and transposed heads; linear layers take the residual stream up, become ours where they are plain ones of an
# MLP whose activation is, and are joined, activations take up what adapters add to gate and up, and norms hand the
# stream on, when each of them is ours, as must be the norms and the rotary of heads that become one op. A file that is
# not named here comes last.
_ORDER = (
    *("loss", "attention", "rotary", "norm", "mlp", "lora", "nf4"),
    *("residual", "mlp_linears", "joint_linears", "lora_glu", "norm_rotary", "residual_norm"),
)


def tables() -> list[Table]:
    """Every table of rules, in the order in which they are applied. A file holds one table (``TABLE``), several
    (``TABLES``), or helpers only."""
    found: list[Table] = []
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    for name in sorted(names, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER)):
        module = importlib.import_module(f"{__name__}.{name}")
        found.extend(getattr(module, "TABLES", ()) or ([module.TABLE] if hasattr(module, "TABLE") else []))
    return found


def table_names() -> list[str]:
    """Names of all patterns, as the report and the option ``disable`` have them."""
    return [t.name for t in tables()]
