"""Every option is honoured or refused, and what is refused names what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fastft
from fastft import reporting
from fastft.options import OptionError, Options
from fastft.patterns import table_names


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reporting.reset()


class Norm(torch.nn.Module):
    """One RMSNorm, as transformers spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(torch.float32)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def compiled(mode: str | None = None, **options: Any) -> fastft.Report:
    """What one training step of a norm reports under these options."""
    call = torch.compile(Norm(), backend="fastft", mode=mode, options=options or None)
    call(torch.randn(2, 8)).sum().backward()
    return fastft.report()


def test_defaults() -> None:
    assert Options.of() == Options.of({}) == Options()
    assert Options() == Options("inductor", None, (), True, "asked", None, None, "never", False, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().fuel = 3  # type: ignore[misc]


def test_every_option_is_documented() -> None:
    for field in dataclasses.fields(Options):
        assert f"``{field.name}``:" in (Options.__doc__ or "")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"residual": "eager"}, Options(residual="eager")),
        ({"fuel": 0}, Options(fuel=0)),
        ({"fuel": None}, Options()),
        ({"disable": "rms_norm"}, Options(disable=("rms_norm",))),
        ({"disable": "rms_norm, attention,"}, Options(disable=("rms_norm", "attention"))),
        ({"disable": ["rms_norm", "attention"]}, Options(disable=("rms_norm", "attention"))),
        ({"disable": ()}, Options()),
        ({"lazy_logits": False}, Options(lazy_logits=False)),
        ({"recompute": "never"}, Options(recompute="never")),
        ({"verify": "first_step"}, Options(verify="first_step")),
        ({"strict": True}, Options(strict=True)),
        ({"inductor": {"max_autotune": True}}, Options(inductor={"max_autotune": True})),
    ],
)
def test_accepted(options: dict[str, Any], wanted: Options) -> None:
    assert Options.of(options) == wanted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"fule": 3},
            "no option 'fule' (did you mean 'fuel'?); it has attention_dropout, cuda_graphs, disable, fuel",
        ),
        ({"max_autotune": True}, "no option 'max_autotune'"),
        ({3: 3}, "no option 3"),
        ([("fuel", 3)], "options is [('fuel', 3)]; it is a dict"),
        ({"residual": "eagre"}, "option residual is 'eagre' (did you mean 'eager'?); it is one of 'inductor', 'eager'"),
        ({"residual": None}, "option residual is None; it is one of"),
        ({"fuel": -1}, "option fuel is -1; it is a number of rewrites, 0 or more, or None for all of them"),
        ({"fuel": 1.5}, "option fuel is 1.5"),
        ({"fuel": True}, "option fuel is True"),
        ({"fuel": "3"}, "option fuel is '3'"),
        ({"disable": "rms_nrom"}, "option disable names 'rms_nrom' (did you mean 'rms_norm'?); the patterns are "),
        ({"disable": ["attention", 7]}, "option disable names 7"),
        ({"disable": 7}, "option disable is 7; it is a list of patterns"),
        ({"lazy_logits": "no"}, "option lazy_logits is 'no'; it is True or False"),
        ({"strict": 1}, "option strict is 1; it is True or False"),
        ({"recompute": "always"}, "option recompute is 'always'; it is one of 'asked', 'never'"),
        ({"verify": True}, "option verify is True; it is one of 'never', 'first_step'"),
        ({"verify": "first"}, "option verify is 'first' (did you mean 'first_step'?)"),
        ({"inductor": "fast"}, "option inductor is 'fast'; it is a dict"),
        ({"inductor": {"triton.cudagraphs": True}}, "sets triton.cudagraphs, which does not know fastft's"),
        ({"inductor": {"max_autotun": True}}, "option inductor names 'max_autotun' (did you mean 'max_autotune'?)"),
    ],
)
def test_refused(options: Any, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.of(options)
    assert text in str(caught.value)


def test_modes() -> None:
    assert Options.of(None, None) == Options.of(None, "default") == Options()
    assert Options.of(None, "max-autotune-no-cudagraphs").inductor == {"max_autotune": True}
    assert Options.of({"inductor": {"max_autotune": False}}, "max-autotune-no-cudagraphs").inductor == {
        "max_autotune": False
    }


def test_unknown_mode() -> None:
    with pytest.raises(OptionError, match=r"no mode 'defualt' \(did you mean 'default'\?\); it has default, reduce-o"):
        Options.of(None, "defualt")


# ------------------------------------------------------------------------------------------------ through torch.compile


@pytest.mark.parametrize(
    ("mode", "options", "text"),
    [
        (None, {"fule": 3}, "did you mean 'fuel'?"),
        (None, {"fuel": -1}, "option fuel is -1"),
        ("fastest", {}, "fastft has no mode 'fastest'"),
    ],
)
def test_an_error_reaches_the_user(mode: str | None, options: dict[str, Any], text: str) -> None:
    with pytest.raises(Exception, match="OptionError") as caught:
        compiled(mode, **options)
    assert text in str(caught.value)
    assert fastft.reports() == []


def test_residual_fuel_and_disable_reach_the_backend() -> None:
    assert compiled(residual="eager").counts == {"rms_norm": 1}
    reporting.reset()
    torch._dynamo.reset()
    (site,) = compiled(residual="eager", fuel=0).sites
    assert (site.pattern, site.status, site.reason) == ("rms_norm", "skipped", "out of fuel")
    reporting.reset()
    torch._dynamo.reset()
    (site,) = compiled(residual="eager", disable="rms_norm").sites
    assert (site.pattern, site.status) == ("rms_norm", "skipped")


def test_inductor_patches_and_mode_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def instead(gm: torch.fx.GraphModule, inputs: Any, patches: Any) -> Any:
        seen.append(dict(patches))
        return gm.forward

    monkeypatch.setattr("fastft._torch_compat.compile_with_inductor", instead)
    compiled(inductor={"epilogue_fusion": False})
    torch._dynamo.reset()
    compiled("max-autotune-no-cudagraphs")
    asserts = {"size_asserts": False, "alignment_asserts": False}
    assert seen == [asserts | {"epilogue_fusion": False}, asserts | {"max_autotune": True}]


def test_disable_knows_every_pattern() -> None:
    names = table_names()
    assert len(names) == len(set(names))
    assert Options.of({"disable": names}).disable == tuple(names)
