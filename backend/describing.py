"""What a graph is of, for the report: device, inputs, modules in order, and what in them stays with Inductor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft.costs import Memo, added, work_of
from fastft.kernels._op import OPS
from fastft.patterns import _see
from fastft.reporting import Module, Work
from fastft.rewrite import module_path

_INPUT = re.compile(r"L\['(\w+)'\](?:\['(\w+)'\])?")
#: What computes nothing.
_NOTHING = _see.VIEWS | {"contiguous", "size", "input"}


def device_of(graph: fx.Graph) -> str:
    """Name of the device that a graph's inputs are on: the first CUDA device's, or ``"cpu"``."""
    devices = [v.device for n in graph.nodes if isinstance(v := _placeholder(n), torch.Tensor)]
    cuda = next((d for d in devices if d.type == "cuda"), None)
    if cuda is None:
        return devices[0].type if devices else ""
    return torch.cuda.get_device_name(cuda) if torch.cuda.is_available() else "cuda"


def inputs_of(graph: fx.Graph) -> list[str]:
    """What the caller handed in, as ``"input_ids [4, 2048]"``, with the sizes that were traced."""
    found = []
    for node in graph.nodes:
        source = _INPUT.fullmatch(compat.input_source(node)) if node.op == "placeholder" else None
        if source is not None and isinstance(v := _placeholder(node), torch.Tensor):
            sizes = [compat.size_hint(n) for n in v.shape]
            found.append(f"{source[2] or source[1]} [{', '.join('?' if n is None else str(n) for n in sizes)}]")
    return found


def _placeholder(node: fx.Node) -> Any:
    return _see.value(node) if node.op == "placeholder" else None


def modules_of(graph: fx.Graph) -> list[str]:
    """Paths of the modules that a graph was traced from, in the order in which they begin to compute."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if (path := module_path(node)) not in found and _computes(node):
            found[path] = None
    return list(found)


def described(graph: fx.Graph, paths: Iterable[str], into: Mapping[str, str]) -> list[Module]:
    """What stays with Inductor of each module in a rewritten graph. ``paths``: all there were, in order; ``into``: of
    those a rewrite took something from, whose.
    """
    linear, memo = OPS["lora_linear"], Memo()
    left: dict[str, Counter[str]] = {path: Counter() for path in paths}
    work: dict[str, Work] = {}
    for node in graph.nodes:
        name = _computes(node)
        if not name or _is_ours(node):
            continue
        path = module_path(node)
        left.setdefault(path, Counter())[name] += 1
        if name == "linear":
            x, weight = map(_see.value, _see.see(node).args[:2])
            one = work_of(linear, linear.call, (x, weight), {"dtype": _see.dtype(node)}, False, memo)
            work[path] = added("linear", [*filter(None, [work.get(path)]), one])
    return [Module(path, dict(ops), work.get(path), into.get(path, "")) for path, ops in left.items()]


def _computes(node: fx.Node) -> str:
    """Name of the op that a node is; empty for one that computes nothing (a view, a grad mode)."""
    if node.op not in ("call_function", "call_method"):
        return ""
    seen = _see.see(node)
    name = seen.op if seen is not _see.UNKNOWN else str(getattr(node.target, "__name__", node.target))
    return "" if name in _NOTHING or name.startswith("_") or _see.is_noop(seen) else name


def _is_ours(node: fx.Node) -> bool:
    return str(getattr(node.target, "__module__", "")).startswith(("fastft.kernels.", "fastft.patterns."))
