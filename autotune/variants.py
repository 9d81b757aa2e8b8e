"""Variants of ops: other functions that compute the same, ours and the user's.

Ours are ``"triton"``, the op's own kernels, and ``"reference"``, plain PyTorch. Attention has ``"auto"`` (its default),
which lets cuDNN compute what it can, and PyTorch's own beside them: ``"sdpa"``, ``"varlen"``, which is
FlashAttention, and ``"flex"``, which is FlexAttention. A user's variant is a function with the op's signature,
differentiable as the op is. It is registered where it is defined::

    @fastft.variants.register("glu", "mine", supported=mine_supported)
    def mine(gate, up, kind): ...

or by a package's entry point in the group ``fastft_variants``: a module that is imported, or a function that is called,
once, before variants are looked at, and registers what it has.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import logging
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastft.kernels
from fastft.autotune import database
from fastft.autotune.store import Store, StoreError, one_of, record, text
from fastft.fallback import said
from fastft.kernels._config import SPACES, Space, source_of
from fastft.kernels._op import OPS, Cost, Op, Reason
from fastft.options import nearest

log = logging.getLogger("fastft")

GROUP = "fastft_variants"

#: What the entry points of other packages raised: one line each.
_PROBLEMS: list[str] = []
_LOADED = False
_USERS: dict[tuple[str, str], Variant] = {}


@dataclass(frozen=True)
class Variant:
    """One way to compute an op. ``call``, ``supported`` and ``cost`` take the op's arguments (``supported`` and
    ``cost`` fake tensors); ``cost``: of the forward, by which tuning knows the least time that it takes; ``spaces``:
    of its kernels' configurations, which tuning searches; ``source``: sha256 of the file it is from, hex; ``ours``:
    whether it comes with fastft.
    """

    op: str
    name: str
    call: Callable[..., Any]
    supported: Callable[..., Reason | None]
    cost: Callable[..., Cost] | None = None
    spaces: tuple[Space, ...] = ()
    source: str = ""
    ours: bool = False

    def refuses(self, *args: Any, **kwargs: Any) -> Reason | None:
        """Why this variant cannot compute this call, whatever ``supported`` answers with (a Reason, a sentence)."""
        answer = self.supported(*args, **kwargs)
        return answer if answer is None or isinstance(answer, Reason) else Reason("variant", str(answer))


class NotSupported(ValueError):
    """A variant was called with arguments that it cannot compute."""


def register(
    op: str,
    name: str,
    *,
    supported: Callable[..., Reason | None] | None = None,
    space: Space | Sequence[Space] = (),
    cost: Callable[..., Cost] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function as variant ``name`` of ``op``.

    The function has the op's parameters and returns what the op returns, with gradients for what the op gives gradients
    for. It stands in a module, under its own name, with its source: compiled graphs name it, and torch's caches are
    keyed by its file. ``supported``: same arguments, None or why a call cannot be computed (a :class:`Reason` or a
    sentence); None: every call that the op itself supports. ``space``: of its own kernels' configurations, which
    ``fastft tune`` then searches. ``cost``: same arguments, the forward's FLOPs and bytes, where they are others than
    the op's: no configuration is tried that cannot be fast enough by it.
    """
    ops = fastft.kernels.load()
    if op not in ops:
        raise ValueError(f"fastft has no op {op!r}{nearest(op, ops)}; it has {', '.join(sorted(ops))}")
    if not re.fullmatch(r"[A-Za-z][\w.-]{0,59}", name):
        raise ValueError(f"{name!r} is no name of a variant: a letter, then letters, digits, '_', '.', '-', up to 60")
    if name in _own(ops[op]):
        raise ValueError(f"{op} has a variant {name!r} of fastft's own; take another name")

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        spaces = (space,) if isinstance(space, Space) else tuple(space)
        source = _source(function)
        _check_parameters(ops[op], function)
        known = _USERS.get((op, name))
        if known is not None and _where(known.call) != _where(function):
            raise ValueError(f"{op} has a variant {name!r} already, {_where(known.call)}")
        _USERS[op, name] = Variant(op, name, function, supported or _any, cost, spaces, source)
        return function

    return enter


def _any(*args: Any, **kwargs: Any) -> None:
    """Every call."""


def _where(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _source(function: Any) -> str:
    """The hash of a function's file. ``ValueError`` for what a compiled graph cannot name."""
    if not inspect.isfunction(function):
        raise ValueError(f"a variant is a function of a module, not {function!r}")
    if function.__name__ == "<lambda>" or function.__qualname__ != function.__name__ or function.__closure__:
        raise ValueError(
            f"{function.__qualname__} is a lambda, a method, or defined in another function: a variant stands in "
            "a module, where compiled graphs and torch's caches find it by its name"
        )
    try:
        own = inspect.getsource(function)
        module = inspect.getmodule(function)
        return hashlib.sha256((own if module is None else inspect.getsource(module)).encode()).hexdigest()
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{function.__qualname__} has no source that can be read ({error}): torch's caches could not tell "
            "an edited one from this one. Put it into a file"
        ) from None


def _check_parameters(op: Op, function: Callable[..., Any]) -> None:
    def names(f: Callable[..., Any]) -> list[str]:
        return [p.name for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD]

    if names(op.call) != names(function):
        raise ValueError(
            f"{function.__qualname__} has the parameters ({', '.join(names(function))}); {op.name} has "
            f"({', '.join(names(op.call))}), and a variant has the same"
        )


# ------------------------------------------------------------------------------------------------------ what there is


_OWN: dict[str, dict[str, Variant]] = {}


def _own(op: Op) -> dict[str, Variant]:
    """fastft's own, the default first."""
    if op.name not in _OWN or _OWN[op.name][op.default].call is not op.call:
        file = Path(inspect.getfile(op.call))
        source = source_of(file)
        spaces = tuple(s for s in SPACES.values() if s.file == file)
        found = {op.default: (op.call, op.supported), **op.variants, "reference": (op.reference, _any)}
        _OWN[op.name] = {
            name: Variant(op.name, name, call, legal, op.cost, () if name == "reference" else spaces, source, True)
            for name, (call, legal) in found.items()
        }
    return _OWN[op.name]


def table(op: str) -> dict[str, Variant]:
    """Variants of an op by name, ours first. ``KeyError`` for an unknown op."""
    ops = fastft.kernels.load()
    if op not in ops:
        raise KeyError(f"fastft has no op {op!r}{nearest(op, ops)}; it has {', '.join(sorted(ops))}")
    _load()
    return {**_own(ops[op]), **{name: v for (of, name), v in _USERS.items() if of == op}}


def listed(op: str) -> list[Variant]:
    """The variants of an op, ours first. ``KeyError`` for an unknown op, naming those there are."""
    return [*table(op).values()]


def get(op: str, name: str) -> Variant:
    """One variant. ``KeyError`` for an unknown op or variant, naming the nearest and those there are."""
    found = table(op)
    if name not in found:
        more = f"; {'; '.join(_PROBLEMS)}" if _PROBLEMS else ""
        raise KeyError(f"{op} has no variant {name!r}{nearest(name, found)}; it has {', '.join(found)}{more}")
    return found[name]


def _load() -> None:
    """Call the entry points of other packages, once. One may name a module, which registers when it is imported."""
    global _LOADED
    if _LOADED:
        return
    _LOADED = True
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            _enter(entry)
        except Exception as error:
            line = f"variants of the entry point {entry.name} ({entry.value}): {said(error)}"
            _PROBLEMS.append(line)
            log.warning("%s", line)
            log.debug("%s", line, exc_info=error)


def _enter(entry: importlib.metadata.EntryPoint) -> None:
    found = entry.load()
    if callable(found):
        found()
    elif not isinstance(found, types.ModuleType):
        raise TypeError(f"it is {type(found).__name__}, neither a function nor a module")


def bring(what: str) -> None:
    """Import what registers variants: a module by its name, looked for in the working directory too, or a ``.py`` file;
    with ``:function``, call that, as for an entry point. ``ValueError`` where it cannot be imported, and where it
    registers nothing.
    """
    before = dict(_USERS)
    named, _, function = what.partition(":")
    file = Path(named).resolve()
    by_path = named.endswith(".py") or file.is_file()
    if by_path and not file.is_file():
        raise ValueError(f"there is no file {file}")
    name = file.stem if by_path else named
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) or (by_path and "." in name):
        raise ValueError(
            f"{name!r} cannot be the name of a module; give a module's name, or a .py file named as one is"
        )
    folder = str(file.parent if by_path else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        _enter(importlib.metadata.EntryPoint("--import", f"{name}:{function}" if function else name, GROUP))
    except Exception as error:
        raise ValueError(f"it cannot be imported: {said(error)}{_line_of(error, file if by_path else None)}") from error
    there = getattr(sys.modules[name], "__file__", None)
    if by_path and (there is None or not file.samefile(there)):
        raise ValueError(f"Python has another module {name!r}, {there}; rename the file")
    own = [v for v in _USERS.values() if v.call.__module__ == name or v.call.__module__.startswith(f"{name}.")]
    if not own and before == _USERS:
        raise ValueError(
            "it registers no variant: put @fastft.variants.register(op, name) above a function of it, or name what "
            f"registers them, as in {named}:register_all"
        )


def _line_of(error: Exception, file: Path | None) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if file is not None and f.filename == str(file)]
    return f" (line {frames[-1].lineno} of {file})" if frames else ""


def problems() -> list[str]:
    """What the entry points of other packages raised: one line each."""
    return list(_PROBLEMS)


def targets() -> set[Callable[..., Any]]:
    """The users' functions that graphs may call."""
    return {v.call for v in _USERS.values()}


def stamp() -> str:
    """A hash of all users' variants, for torch's caches; empty without any."""
    if not _USERS:
        return ""
    lines = sorted(f"{op} {name} {_where(v.call)} {v.source}" for (op, name), v in _USERS.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_users() -> list[str]:
    """All users' variants, ``op=name`` and the beginning of their source's hash: what ranks must have in common."""
    _load()
    return sorted(f"{op}={name} ({v.source[:12]})" for (op, name), v in _USERS.items())


# ------------------------------------------------------------------------------------------------------- verified ones

_VERIFIED = record(source=text(64), versions=text(60), device=text(60), passed=one_of(True, False))


def _verified_store(strict: bool = False) -> Store:
    return Store("verified", _VERIFIED, version=1, strict=strict)


def note_verified(variant: Variant, device: str, passed: bool) -> str:
    """Keep what ``fastft verify --variant`` found of a variant on a device of this kind (empty: CPU). Why it could not
    be kept; empty: it was.
    """
    value = {"source": variant.source, "versions": database.versions(), "device": device, "passed": passed}
    try:
        _verified_store(strict=True).put(f"{variant.op}/{variant.name}/{device or 'cpu'}", value)
    except StoreError as error:
        return str(error)
    return ""


def verified(variant: Variant, device: str) -> bool:
    """Whether this very source passed on this kind of device, or is ours."""
    if variant.ours:
        return True
    value = _verified_store().get(f"{variant.op}/{variant.name}/{device or 'cpu'}")
    known = (variant.source, database.versions())
    return value is not None and value["passed"] and (value["source"], value["versions"]) == known


# ----------------------------------------------------------------------------------------------------------- selection


def choose(op: Op, explicit: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Variant | Reason:
    """The variant for one site, in the order of :func:`fastft.autotune.database.select`; or why the one that was asked
    for is none for it. ``args``, ``kwargs``: the op's, fake tensors.
    """
    default = _own(op)[op.default]
    device, key = site_key(op, args, kwargs) if explicit is None else ("", "")
    found, source = database.select(key, device, explicit)
    if source == "heuristic":
        return default
    if source == "explicit":
        variant = get(op.name, found)
        reason = variant.refuses(*args, **kwargs)
        return variant if reason is None else Reason("variant", f"variant {found}: {reason}")
    variant_ = table(op.name).get(found["variant"])
    if variant_ is None or variant_.source[:12] != found["source"] or variant_.refuses(*args, **kwargs) is not None:
        return default  # measured with a function that is not there now
    return variant_


def called(op: Op, target: Any) -> Variant | None:
    """The variant of ``op`` that a graph calls as ``target``; None where that is none."""
    known = (*_own(op).values(), *(v for v in _USERS.values() if v.op == op.name))
    return next((v for v in known if v.call is target), None)


#: Arguments that no site's choice depends on.
_NOT_KEYED = (
    {"eps", "scale", "scaling", "logit_scale", "temperature", "ignore_index", "reduction", "gate_first", "dropout_p"}
    # What is added, read, rounded to or handed on beside the work itself.
    | {"bias", "b_bias", "residual", "x_lora", "out_dtype", "pass_through"}
    | {"entropy", "entropy_gradient", "is_top1", "mean_logits", "log_sum_sq_probs"}
    # What follows from other arguments, or nearly: the dtype is in every key.
    | {"dtype", "b", "cos", "sin", "quant", "absmax", "absmax_offset", "absmax2", "blocksize", "blocksize2"}
)


def site_key(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """The device's kind and the key of a site's record; empty where nothing can be found (another device than a GPU,
    sizes that are not known yet).

    Two calls that cost the same have one key, however they are spelled: what is at its default is left out, and a dtype
    that is the one computed in, which ``dtype`` says, or else the first operand.
    """
    signature = inspect.signature(op.call)
    given = signature.bind(*args, **kwargs).arguments
    leaves: dict[str, Any] = {}
    for name, value in given.items():
        default = signature.parameters[name].default
        usual = value is default or (isinstance(value, (bool, int, float, str)) and value == default)
        if name not in _NOT_KEYED and not usual:
            leaves |= {f"{name}{i or ''}": leaf for i, leaf in enumerate(_leaves(value)) if leaf is not None}
    tensors = [t for t in leaves.values() if isinstance(t, torch.Tensor)]
    device = database.device_kind(tensors[0].device) if tensors else ""
    if not device or any(not isinstance(n, int) for t in tensors for n in t.shape):
        return "", ""
    dtype = given.get("dtype") or tensors[0].dtype
    tokens: dict[str, int] = {}
    sizes: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            # The first operand and what has a batch has one row for each token; weights have not.
            counted = leaf is tensors[0] or leaf.dim() > 2
            if not leaf.dtype.is_floating_point:  # labels, masks, packed weights: their sizes follow from the others
                sizes[name] = "given"
                continue
            if leaf.dim() > 1:
                (tokens if counted else sizes)[f"{name}.rows"] = leaf.shape[:-1].numel()
            sizes[name] = leaf.shape[-1] if leaf.dim() else 1
        elif isinstance(leaf, float):
            sizes[name] = int(leaf != 0.0)
        elif leaf is not dtype:
            sizes[name] = str(leaf)
    named = {**tokens, **sizes}
    return device, database.key_of(
        f"variant of {op.name}",
        tokens,
        sizes,
        device=device,
        dtype=dtype,
        source=source_of_op(op),
        **named,
    )


def source_of_op(op: Op) -> str:
    """The hash of what an op's own variants are: an edit makes what was measured of them void."""
    return _own(op)[op.default].source


def _leaves(found: Any) -> list[Any]:
    if isinstance(found, dict):
        found = [found[name] for name in sorted(found)]
    return [leaf for one in found for leaf in _leaves(one)] if isinstance(found, (list, tuple)) else [found]


def run(op: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a variant from a function that stands in a graph in the op's place and prepares its operands;
    :class:`NotSupported` where it cannot compute the call.
    """
    if not name:
        return OPS[op].call(*args, **kwargs)
    variant = get(op, name)
    if (reason := variant.refuses(*args, **kwargs)) is not None:
        raise NotSupported(f"variant {name}: {reason}")
    return variant.call(*args, **kwargs)


__all__ = ["Cost", "NotSupported", "Reason", "Space", "Variant", "get", "listed", "register"]
