"""What ``fastft.verify`` and the first step of a training run share: the exact computation, the verdict, and the search
for the rewrite that is to blame.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastft import _torch_compat as compat
from fastft.compare import Comparison, compare, rounding
from fastft.reporting import Site

#: What is compared, by name: the loss or an output, and gradients.
Values = dict[str, torch.Tensor]


class VerificationError(RuntimeError):
    """A compiled graph does not compute what the uncompiled one computes (raised under ``strict``)."""


def by_name(leaves: Mapping[str, torch.Tensor], grads: Sequence[torch.Tensor | None]) -> Values:
    """Gradients by name; zero where there is none."""
    pairs = zip(leaves.items(), grads, strict=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def widened(tensor: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(wide).requires_grad_(tensor.requires_grad)


class Wide(TorchFunctionMode):
    """Runs PyTorch code with ``wide`` in place of every narrower floating-point dtype that it names, without autocast,
    and with the dropout masks that it would draw in ``drawn``: the exact value of what the code means.
    """

    def __init__(self, wide: torch.dtype, drawn: torch.dtype) -> None:
        super().__init__()
        self.wide, self.drawn = wide, drawn
        self.outer: dict[str, bool] = {}

    def __enter__(self) -> Wide:
        self.outer = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for kind, enabled in self.outer.items():
            torch.set_autocast_enabled(kind, enabled)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in ("cuda", "cpu"):  # a region that was entered, whoever did: leaving it restores what was outside
            if torch.is_autocast_enabled(kind):
                torch.set_autocast_enabled(kind, False)
        if func in (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float):
            return args[0].to(self.wide, **kwargs)
        if func in (torch.nn.functional.dropout, torch.dropout):
            return self._dropout(*args, **kwargs)
        if func is not torch.Tensor.view:  # view(dtype) looks at the bits
            args, kwargs = compat.tree_map(self._dtype, (args, kwargs))
        return func(*args, **kwargs)

    def _dtype(self, x: Any) -> Any:
        narrower = isinstance(x, torch.dtype) and x.is_floating_point and x.itemsize < self.wide.itemsize
        return self.wide if narrower else x

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
    ) -> torch.Tensor:
        if not (training and train) or p == 0.0:
            return input
        kept = torch.nn.functional.dropout(torch.ones_like(input, dtype=self.drawn), p) != 0
        return torch.where(kept, input / (1 - p) if p < 1 else input, 0.0)


def narrowest(tensors: Sequence[Any]) -> torch.dtype:
    """The dtype that decides how exact the arithmetic is: the narrowest of the tensors' and autocast's. Storage formats
    of 8 bits and fewer are left aside: nothing is computed in them.
    """
    kinds = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype.itemsize > 1}
    for device in {t.device.type for t in tensors if isinstance(t, torch.Tensor)} & {"cpu", "cuda"}:
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def wider(dtype: torch.dtype) -> torch.dtype:
    """What the exact step computes in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def terms_of(tree: Any) -> int:
    """Terms of the longest sum in a loss or a gradient, as far as data tell: their tokens (or rows)."""
    tensors: list[torch.Tensor] = []
    compat.tree_map(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, tree)
    return max((x[..., 0].numel() if x.is_floating_point() and x.dim() > 1 else x.numel() for x in tensors), default=1)


def verdicts(found: Values, eager: Values, exact: Values, dtype: torch.dtype, terms: int) -> list[Comparison]:
    """The error rule for every value. A small gradient is a handful of roundings, and eager's may be small by luck: the
    upper quartile of eager's errors is allowed to each but the loss, which is no gradient.
    """
    rows = [compare(name, found[name], eager[name], exact[name], length=terms, dtype=dtype) for name in found]
    errors = [row.torch_error for row in rows if row.name != "loss" and math.isfinite(row.torch_error)]
    typical = statistics.quantiles(errors, n=4, method="inclusive")[2] if len(errors) > 1 else 0.0
    return [row.allowing(2 * typical + rounding(dtype, terms)) if row.name != "loss" else row for row in rows]


def still_wrong(rows: Sequence[Comparison], before: Sequence[Comparison]) -> bool:
    """Whether a value that was wrong before is wrong now."""
    names = {row.name for row in before if not row.ok}
    return any(not row.ok and row.name in names for row in rows)


def first_wrong(
    at: Callable[[int | None], tuple[bool, list[Site]]], with_all: tuple[bool, list[Site]]
) -> tuple[Site | None, str]:
    """The first rewrite that makes the values wrong. ``at(fuel)``: whether they are wrong with so many rewrites, all
    else run op by op, and the rewrites made; ``with_all``: the same for all of them.
    """
    wrong, sites = with_all
    if not wrong:
        return None, (
            "the rewrites are right, Inductor's code for the rest of the graph is not: options={'residual': 'eager'} "
            "leaves it out"
        )
    right, bad = 0, len([site for site in sites if fuelled(site)])
    if at(0)[0]:
        return None, "no rewrite: the captured graph is wrong without any (FASTFT_BRIDGES=0 leaves out the bridges)"
    while bad - right > 1:
        middle = (right + bad) // 2
        if at(middle)[0]:
            bad = middle
        else:
            right = middle
    blame = [site for site in at(bad)[1] if fuelled(site)][-1]
    where = f" in {blame.module}" if blame.module else ""
    return blame, (
        f"{blame.pattern}{where}, rule {blame.rule}: rewrite {bad} is the first wrong one; "
        f"options={{'disable': ['{blame.pattern}']}} leaves it out"
    )


def fuelled(site: Site) -> bool:
    return not site.rule.startswith("bridges/")


def worst_first(rows: Sequence[Comparison]) -> list[Comparison]:
    return sorted(rows, key=lambda r: (r.ok, -r.error / r.bound if r.bound else 0.0))


def random_state() -> list[torch.Tensor]:
    """The CPU's, then every GPU's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def differ(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))
