"""The options of ``torch.compile(model, backend="fastft", options={...})``: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastft import _torch_compat as compat

#: What ``memory`` can be beside a number of bytes.
MEMORY = ("auto", "lean", "fast")
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

#: ``mode=`` values, as ``torch.compile`` has them, and the options that they stand for here.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"cuda_graphs": True},
    "max-autotune": {"cuda_graphs": True, "inductor": {"max_autotune": True}},
    "max-autotune-no-cudagraphs": {"inductor": {"max_autotune": True}},
}


class OptionError(ValueError):
    """An option or mode that fastft does not know, or a value outside of what is allowed."""


@dataclass(frozen=True)
class Options:
    """What a user can ask of the backend.

    ``residual``: who compiles what no rule replaced: ``"inductor"`` (default), or ``"eager"``, which runs it op by
    op, for debugging.
    ``fuel``: only the first so many rewrites are made (table by table, each from the end of the graph); None: all. For
    finding a wrong rewrite by bisection.
    ``disable``: patterns that are left alone (``["rotary", "attention"]`` or ``"rotary,attention"``); names as in the
    report.
    ``lazy_logits``: the model's logits output is computed only when somebody reads it (default True).
    ``recompute``: ``"asked"`` (default) recomputes the layers that the user put under gradient checkpointing;
    ``"never"`` keeps everything.
    ``memory``: how much memory a training step may take: bytes, or a number with a unit (``"40GiB"``, ``"24GB"``);
    ``"auto"``, what is free on the device; ``"lean"``, at most 7 % more than as little as can be; ``"fast"``, as
    much as there is use for.
    The layers then keep, recompute or offload what makes the step the fastest that fits (:mod:`fastft.planner`), under
    gradient checkpointing or not. None (default): ``recompute`` decides.
    ``host_memory``: most bytes of pinned host memory that offloading may take, as ``memory``; 0: nothing is offloaded;
    None (default): a quarter of what is free when the graph is compiled.
    ``verify``: ``"first_step"`` computes the first step of each compiled graph also uncompiled, and in fp32 (fp64 for
    fp32 graphs); a graph that does not keep the error rule runs uncompiled from there on, with a warning and a row in
    the report. Dropout then draws as eager does. ``"never"`` (default).
    ``cuda_graphs``: each graph's forward and backward are recorded as CUDA graphs and replayed in every step of the
    same sizes (default False; ``mode="reduce-overhead"`` sets it): a model whose kernels are short does not wait for
    the host. Ignored labels cost as much as others then (:mod:`fastft.cuda_graphs`).
    ``strict``: what fails inside of fastft raises :class:`fastft.fallback.InternalError`, instead of being undone and
    reported; and what Inductor compiles asserts the sizes and strides of every input and every op's result.
    ``variants``: op → the variant of it that is taken wherever it is legal (``{"glu": "mine"}``); the sites where it is
    not stay as they were (:mod:`fastft.variants`).
    ``inductor``: config patches for Inductor (``{"max_autotune": True}``), as ``torch.compile(options=...)`` takes
    them without us.
    ``attention_dropout``: attention whose weights are dropped (``attention_dropout`` of a config) is replaced like any
    other, and draws its dropout itself: reproducibly, and other numbers than PyTorch would (default True). False leaves
    it as it is; so does ``verify``, which compares with eager.
    ``skip_padding``: attention gives zeros for queries of padding behind the last token of their sequence, as
    transformers has it with FlashAttention, and computes nothing for them. Other tokens' results and gradients are as
    they were; hidden states and logits of padding are others (default False). Not under ``verify``, which compares with
    eager.
    """

    residual: str = "inductor"
    fuel: int | None = None
    disable: tuple[str, ...] = ()
    lazy_logits: bool = True
    recompute: str = "asked"
    memory: str | int | None = None
    host_memory: str | int | None = None
    verify: str = "never"
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, str] = field(default_factory=dict)
    attention_dropout: bool = True
    skip_padding: bool = False
    cuda_graphs: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Read what ``torch.compile`` was given. Raises :class:`OptionError`, naming what was asked, what is allowed,
        and the nearest known name.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is {options!r}; it is a dict of option names and values")
        given = dict(options or {})
        known = {f.name for f in dataclasses.fields(cls)}
        for key in given:
            if key not in known:
                raise OptionError(
                    f"fastft has no option {key!r}{nearest(key, known)}; it has {', '.join(sorted(known))}"
                )
        if isinstance(given.get("disable"), str):
            given["disable"] = tuple(n.strip() for n in given["disable"].split(",") if n.strip())
        elif "disable" in given:
            if not isinstance(given["disable"], Iterable):
                raise OptionError(f"option disable is {given['disable']!r}; it is a list of patterns")
            given["disable"] = tuple(given["disable"])
        result = cls(**given)
        result._check()
        return result._with_mode(mode)

    def _check(self) -> None:
        _one_of("residual", self.residual, ("inductor", "eager"))
        _one_of("recompute", self.recompute, ("asked", "never"))
        _one_of("verify", self.verify, ("never", "first_step"))
        if self.memory is not None:
            if self.memory not in MEMORY:
                bytes_of("memory", self.memory, f"{', '.join(map(repr, MEMORY))}, ")
            if self.recompute != "asked":
                raise OptionError(
                    f"options memory={self.memory!r} and recompute={self.recompute!r} are both given; memory decides"
                    ' what is recomputed: leave recompute out (memory="fast" recomputes no layer)'
                )
        if self.host_memory is not None:
            bytes_of("host_memory", self.host_memory)
        if self.fuel is not None and (isinstance(self.fuel, bool) or not isinstance(self.fuel, int) or self.fuel < 0):
            raise OptionError(
                f"option fuel is {self.fuel!r}; it is a number of rewrites, 0 or more, or None for all of them"
            )
        for name in ("lazy_logits", "attention_dropout", "strict", "skip_padding", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"option {name} is {getattr(self, name)!r}; it is True or False")
        if self.cuda_graphs and self.residual == "eager":
            raise OptionError(
                'options residual="eager" and cuda_graphs=True (mode="reduce-overhead") are both given; what runs op by'
                " op is not recorded: leave one of them out"
            )
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"option inductor is {self.inductor!r}; it is a dict of Inductor config patches")
        settings = compat.inductor_settings()
        for name in self.inductor:
            if name not in settings:
                raise OptionError(
                    f"option inductor names {name!r}{nearest(name, settings)}; Inductor has no such setting"
                )
        if self.inductor.get("triton.cudagraphs"):
            raise OptionError(
                "option inductor sets triton.cudagraphs, which does not know fastft's reused buffers; leave it out, and"
                ' set option cuda_graphs to True (mode="reduce-overhead")'
            )
        self._check_variants()
        from fastft.patterns import table_names

        names = table_names() if self.disable else []
        for name in self.disable:
            if name not in names:
                raise OptionError(
                    f"option disable names {name!r}{nearest(name, names)}; the patterns are {', '.join(names)}"
                )

    def _check_variants(self) -> None:
        if not isinstance(self.variants, Mapping):
            raise OptionError(f"option variants is {self.variants!r}; it is a dict of ops and names of their variants")
        if not self.variants:
            return
        from fastft.autotune import variants

        for op, name in self.variants.items():
            try:
                variants.get(op, name)
            except KeyError as error:
                raise OptionError(f"option variants is {dict(self.variants)!r}: {error.args[0]}") from None

    def _with_mode(self, mode: str | None) -> Options:
        if mode is None:
            return self
        if mode not in MODES:
            raise OptionError(f"fastft has no mode {mode!r}{nearest(str(mode), MODES)}; it has {', '.join(MODES)}")
        asked = MODES[mode]
        result = dataclasses.replace(self, **{**asked, "inductor": {**asked.get("inductor", {}), **self.inductor}})
        result._check()
        return result


def bytes_of(name: str, got: Any, others: str = "") -> int:
    """A number of bytes: an int, or a number and a unit in a string. Raises :class:`OptionError`; ``others`` are the
    values that option ``name`` can have besides.
    """
    if isinstance(got, int) and not isinstance(got, bool) and got >= 0:
        return got
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", got) if isinstance(got, str) else None
    if found is None or found[2] not in UNITS:
        hint = nearest(found[2], UNITS) if found is not None else ""
        raise OptionError(
            f"option {name} is {got!r}; it is {others}a number of bytes (17179869184), or a number with a unit in"
            f' a string ("16GiB"); units are {", ".join(UNITS)}{hint}'
        )
    return int(float(found[1]) * UNITS[found[2]])


def _one_of(name: str, got: Any, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise OptionError(
            f"option {name} is {got!r}{nearest(str(got), allowed)}; it is one of {', '.join(map(repr, allowed))}"
        )


def nearest(word: str, known: Any) -> str:
    """A hint for an unknown name; empty when none is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
