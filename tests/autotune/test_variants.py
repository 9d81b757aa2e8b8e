"""Variants: what there is, what can be registered, and that the one that was asked for is in the program."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, make_boxed_func

import fastft
import fastft.kernels
from fastft import reporting
from fastft.autotune import database
from fastft.autotune import variants as module
from fastft.kernels import _attention_routes as routes
from fastft.kernels._attention_mask import attention_mask
from fastft.kernels._op import OPS, Reason
from fastft.options import OptionError, Options
from tests.autotune import _mine
from tests.kernels._samples import samples

fastft.kernels.load()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(module, "_USERS", {})
    monkeypatch.setattr(module, "_PROBLEMS", [])
    monkeypatch.setattr(module, "_LOADED", True)
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path))
    database.forget()
    torch._dynamo.reset()
    reporting.reset()
    _mine.CALLS.clear()
    yield
    database.forget()


class MLP(torch.nn.Module):
    """Two SwiGLUs and a GeGLU."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.silu(a) * b
        return torch.nn.functional.silu(y) * b + torch.nn.functional.gelu(a) * y


def trained(model: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> tuple[list[torch.Tensor], fastft.Report]:
    """Loss and gradients of a step, and its report."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = torch.compile(model, backend="fastft", options={"residual": "eager", **options})(*leaves).square().sum()
    return [loss, *torch.autograd.grad(loss, leaves)], fastft.report()


LINEARS = ("lora_linear", "lora_linears")
LOSSES = ("linear_cross_entropy", "linear_log_prob")


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8), torch.randn(2, 3, 8)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_ours(op: str) -> None:
    found = {v.name: v for v in fastft.variants.list(op)}
    more = {"attention": ["auto", "triton", "sdpa", "varlen", "flex"]}
    more |= {name: ["triton", "accumulated"] for name in LINEARS}
    more |= {name: ["triton", "fused", "filtered"] for name in LOSSES}
    assert [*found] == [*more.get(op, ["triton"]), "reference"]
    assert next(iter(found.values())).call is OPS[op].call
    assert found["reference"].call is OPS[op].reference
    for v in found.values():
        assert v.ours and v.op == op and len(v.source) == 64
        assert fastft.variants.get(op, v.name) == v


def test_the_reference_is_legal_everywhere() -> None:
    for op in OPS.values():
        for sample in samples(op):
            assert fastft.variants.get(op.name, "reference").refuses(*sample.args, **sample.kwargs) is None


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match=r"no op 'gluu' \(did you mean 'glu'\?\)"):
        fastft.variants.list("gluu")
    with pytest.raises(
        KeyError, match=r"no variant 'refrence' \(did you mean 'reference'\?\); it has triton, reference"
    ):
        fastft.variants.get("glu", "refrence")


def test_a_users_variant() -> None:
    assert fastft.variants.register("glu", "mine", supported=_mine.only_silu)(_mine.glu) is _mine.glu
    mine = fastft.variants.get("glu", "mine")
    assert not mine.ours and mine in fastft.variants.list("glu")
    assert mine.refuses(*pair(), "silu") is None
    assert mine.refuses(*pair(), "gelu") == Reason("variant", "gelu is another activation")
    fastft.variants.register("glu", "mine")(_mine.glu)  # a notebook's cell run again
    with pytest.raises(ValueError, match=r"a variant 'mine' already, tests\.autotune\._mine\.glu"):
        fastft.variants.register("glu", "mine")(_mine.wrong_glu)


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("gluu", "mine", r"no op 'gluu' \(did you mean 'glu'\?\)"),
        ("glu", "triton", "of fastft's own"),
        ("glu", "a b", "no name of a variant"),
        ("glu", "", "no name of a variant"),
    ],
)
def test_names_that_cannot_be_taken(op: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastft.variants.register(op, name)


def test_functions_that_a_graph_cannot_name() -> None:
    def inner(gate: Any, up: Any, kind: str) -> Any:
        return gate

    made: dict[str, Any] = {}
    exec("def sourceless(gate, up, kind):\n    return gate", {"__name__": "nowhere"}, made)
    for function, message in (
        (lambda gate, up, kind: gate, "lambda"),
        (inner, "defined in another function"),
        (made["sourceless"], "no source that can be read"),
        (torch.nn.Identity(), "a function of a module"),
        (_mine.never, r"parameters \(args\); glu has \(gate, up, kind\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.variants.register("glu", "mine")(function)
    assert module._USERS == {}


def test_the_variant_that_was_asked_for_is_in_the_program() -> None:
    fastft.variants.register("glu", "mine", supported=_mine.only_silu)(_mine.glu)
    inputs = pair()
    plain, _ = trained(MLP(), *inputs)
    torch._dynamo.reset()
    reporting.reset()
    assert not _mine.CALLS
    found, report = trained(MLP(), *inputs, variants={"glu": "mine"})
    assert set(_mine.CALLS) == {"silu"}
    torch.testing.assert_close(found, plain)
    replaced = [s for s in report.sites if s.status == "replaced"]
    assert [s.notes for s in replaced] == ["variant mine"] * 2
    (left,) = report.missed
    assert left.reason == "variant: variant mine: gelu is another activation"
    assert "variant glu=mine" not in report.plan


def test_without_a_choice_nothing_is_noted() -> None:
    _, report = trained(MLP(), *pair())
    assert [s.notes for s in report.sites] == [""] * 3
    assert not report.missed


def test_a_variant_that_is_legal_nowhere_leaves_all_sites() -> None:
    fastft.variants.register("glu", "mine", supported=_mine.never)(_mine.glu)
    _, report = trained(MLP(), *pair(), variants={"glu": "mine"})
    assert report.counts == {} and {s.reason for s in report.missed} == {"variant: variant mine: no time today"}
    assert report.plan["variant glu=mine"] == "asked for, and no site of this graph took it"


def test_inductor_compiles_a_variant_too() -> None:
    fastft.variants.register("glu", "mine", supported=_mine.only_silu)(_mine.glu)
    inputs = pair()
    plain, _ = trained(MLP(), *inputs)
    torch._dynamo.reset()
    found, _ = trained(MLP(), *inputs, variants={"glu": "mine"}, residual="inductor")
    torch.testing.assert_close(found, plain)


def test_its_source_is_in_the_cache_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft import compiler

    stamped: list[dict[str, str]] = []
    stock = compiler.compat.cache_stamp
    monkeypatch.setattr(compiler.compat, "cache_stamp", lambda f: stamped.append(dict(f)) or stock(f))
    monkeypatch.setattr(compiler.compat, "compile_with_inductor", lambda gm, *_: gm)  # it takes seconds
    assert module.stamp() == ""
    fastft.variants.register("glu", "mine", supported=_mine.only_silu)(_mine.glu)
    trained(MLP(), *pair(), variants={"glu": "mine"}, residual="inductor")
    (one,) = stamped
    assert module.stamp() and module.stamp() in one["tests.autotune._mine.glu"]
    before = module.stamp()
    monkeypatch.setattr(module, "_source", lambda function: "0" * 64)
    fastft.variants.register("glu", "mine", supported=_mine.only_silu)(_mine.glu)
    assert module.stamp() != before


class Attention(torch.nn.Module):
    def __init__(self, causal: bool = True, autocast: bool = False) -> None:
        super().__init__()
        self.causal, self.autocast = causal, autocast

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = None
        if not self.causal:
            i = torch.arange(q.shape[2], device=q.device)
            mask = ((i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 2))[None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal).float()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["auto", "triton", "sdpa", "reference"])
def test_attentions_routes(name: str, autocast: bool) -> None:
    inputs = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    plain, _ = trained(Attention(autocast=autocast), *inputs)
    torch._dynamo.reset()
    reporting.reset()
    found, report = trained(Attention(autocast=autocast), *inputs, variants={"attention": name})
    (site,) = report.sites
    assert site.status == "replaced" and ("variant" in site.notes) == (name != "auto")
    torch.testing.assert_close(found, plain, **({"rtol": 0.05, "atol": 0.05} if autocast else {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_mask_that_sdpa_does_not_know(autocast: bool) -> None:
    inputs = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    _, report = trained(Attention(causal=False, autocast=autocast), *inputs, variants={"attention": "sdpa"})
    (site,) = report.missed
    assert "variant sdpa: scaled_dot_product_attention knows a causal mask" in site.reason


def test_triton_is_not_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDA:
        is_cuda, device, shape, dtype = True, torch.device("cuda", 0), (1, 2, 5, 4), torch.bfloat16

    monkeypatch.setattr(routes, "_cudnn_takes", lambda *a: True)
    monkeypatch.setattr(routes, "use_triton", lambda q: True)
    monkeypatch.setattr(routes, "PLANS", routes.Plans())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    recording = False
    q: Any = CUDA()
    arguments = (q, q, q, *(None,) * 8, True, 0, 0, 1.0, 0.0)
    assert routes.Call(*arguments).backend == "cudnn"
    assert routes.Call(*arguments, route="triton").backend == "triton"
    recording = True  # a CUDA graph, where no plan can be made
    assert routes.Call(*arguments).backend == "cudnn"
    q.shape = (1, 2, 7, 4)
    assert routes.Call(*arguments).backend == "triton"
    recording = False
    assert routes.Call(*arguments).backend == "cudnn"


def test_every_sample_of_attention_by_the_other_routes() -> None:
    for name in ("triton", "sdpa"):
        variant, ran = fastft.variants.get("attention", name), 0
        for sample in samples(OPS["attention"]):
            if variant.refuses(*sample.args, **sample.kwargs) is None:
                torch.testing.assert_close(sample.outputs(variant.call), sample.outputs(OPS["attention"].reference))
                ran += 1
        assert ran


@pytest.fixture
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention itself has no gradients there."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(routes, "FLEX_DEVICES", ("cpu",))
    compiled = torch.compile(flex_attention.flex_attention, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(routes, "_compiled_flex", lambda: compiled)


@pytest.mark.parametrize("causal", [True, False])
def test_flex_is_taken_where_it_is_asked_for(causal: bool, flex_on_a_cpu: None) -> None:
    inputs = [torch.randn(1, 2, 20, 16) for _ in range(3)]
    plain, _ = trained(Attention(causal), *inputs)
    torch._dynamo.reset()
    reporting.reset()
    found, report = trained(Attention(causal), *inputs, variants={"attention": "flex"})
    (site,) = report.sites
    assert site.status == "replaced" and site.notes.endswith("variant flex")
    torch.testing.assert_close(found, plain)


def test_flex_has_blocks_of_each_sequence(flex_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their masks differ; its maths on a CPU looks at no blocks."""
    from torch.nn.attention import flex_attention

    made: list[int | None] = []
    stock = flex_attention.create_block_mask
    monkeypatch.setattr(
        flex_attention, "create_block_mask", lambda mod, batch, *rest: made.append(batch) or stock(mod, batch, *rest)
    )
    q = torch.randn(2, 1, 20, 16)
    for options in ({}, {"padding": torch.ones(2, 20)}, {"positions": torch.arange(20).expand(2, -1)}):
        routes.attention_flex(q, q, q, causal=True, **options)
    assert made == [None, 2, 2]


def test_flex_refuses_what_it_does_not_do() -> None:
    q = torch.randn(1, 2, 20, 16)
    padding = torch.ones(1, 20)
    for options, code in (
        ({"dense": torch.zeros(20, 20)}, "mask"),
        ({"causal": True, "padding": padding, "blind": "filled"}, "mask"),
        ({"causal": True, "mask": attention_mask(padding, None), "blind": "added"}, "mask"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"causal": True}, "device"),
    ):
        reason = routes.flex_supported(q, q, q, **options)  # type: ignore[arg-type]
        assert reason is not None and reason.code == code, reason
    narrow = routes.flex_supported(q[..., :8], q[..., :8], q)
    assert narrow is not None and narrow.code == "head_size"


def _as_a_graph(*qkv: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """As AOTAutograd traces the call, which must leave FlexAttention's own in both of its graphs."""
    graphs: list[str] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(" ".join(str(n.target) for n in gm.graph.nodes))
        return make_boxed_func(gm.forward)

    names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return routes.attention_flex(q, k, v, **{**kwargs, **dict(zip(names, given, strict=True))})

    traced = aot_function(call, fw_compiler=keep, bw_compiler=keep)
    found: torch.Tensor = traced(*qkv, *(kwargs[name] for name in names))
    torch.autograd.grad(found, qkv, torch.ones_like(found), retain_graph=True)
    assert "flex_attention" in graphs[0] and "flex_attention_backward" in graphs[1]
    return found


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_flex_computes_what_the_op_does(in_a_graph: bool, flex_on_a_cpu: None) -> None:
    """Every sample that it takes, by itself and as a call of the graph's."""
    variant, ran = fastft.variants.get("attention", "flex"), 0
    torch._dynamo.reset()
    for sample in samples(OPS["attention"]):
        q, k, v = (F.pad(t, (0, 16)) for t in sample.args)
        scale = sample.kwargs.get("scale") or sample.args[0].shape[-1] ** -0.5
        kwargs = {**sample.kwargs, "scale": scale, "blind": "zero"}
        if kwargs.get("dense") is not None or kwargs.get("sinks") is not None or kwargs.get("dropout_p"):
            assert variant.refuses(q, k, v, **kwargs) is not None
            continue
        assert variant.refuses(q, k, v, **kwargs) is None
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        found = (_as_a_graph if in_a_graph else variant.call)(*leaves, **kwargs)
        wanted = OPS["attention"].reference(*leaves, **kwargs)
        do = torch.randn_like(wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(t, leaves, do) for t in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        ran += 1
    assert ran >= 5
    torch._dynamo.reset()


@pytest.mark.parametrize("op", sorted(set(OPS) - {"lora_linears", "nf4_dequantize"}))
def test_references_have_the_ops_results_and_gradients(op: str) -> None:
    reference = fastft.variants.get(op, "reference").call
    for sample in samples(OPS[op]):
        for call in (OPS[op].call, reference):
            assert all(isinstance(t, torch.Tensor) or t is None for t in sample.outputs(call))


def test_options() -> None:
    assert Options.of({"variants": {"glu": "reference"}}).variants == {"glu": "reference"}
    for wrong, message in (
        ({"gluu": "mine"}, r"no op 'gluu' \(did you mean 'glu'\?\); it has add_rms_norm, attention, "),
        ({"glu": "refrence"}, r"no variant 'refrence' \(did you mean 'reference'\?\); it has triton, reference"),
        ("glu", "it is a dict of ops"),
    ):
        with pytest.raises(OptionError, match=message):
            Options.of({"variants": wrong})


def entry_points(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    found = [importlib.metadata.EntryPoint(f"e{i}", v, module.GROUP) for i, v in enumerate(values)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(module, "_LOADED", False)


def plug_in() -> None:
    fastft.variants.register("glu", "plugged")(_mine.glu)


def broken() -> None:
    raise RuntimeError("no such GPU")


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, f"{__name__}:broken", "no.such.module:x", f"{__name__}:plug_in")
    assert "plugged" in {v.name for v in fastft.variants.list("glu")}
    lines = [e for e in fastft.report().errors if "entry point" in e]
    assert len(lines) == 2 and "RuntimeError: no such GPU" in lines[0] and "no.such.module" in lines[1]
    with pytest.raises(OptionError, match="no such GPU"):
        Options.of({"variants": {"glu": "mine"}})


# ----------------------------------------------------------------------------------------------------- what was tuned


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "device_kind", lambda device=None: "h100")


def tuned(variant: module.Variant, **more: Any) -> dict[str, Any]:
    one = dict(
        config={}, variant=variant.name, source=variant.source[:12], us=1.0, heuristic_us=2.0, noise=0.01, tried=2
    )
    return {**one, "failures": {}, **more}


def test_a_tuned_variant_is_taken_where_it_was_measured(h100: None) -> None:
    fastft.variants.register("glu", "mine")(_mine.glu)
    op, args = OPS["glu"], (*pair(), "silu")
    _, key = module.site_key(op, args, {})
    assert module.choose(op, None, args, {}).name == "triton"  # type: ignore[union-attr]
    database.user_store().put(key, tuned(fastft.variants.get("glu", "mine")))
    database.forget()
    assert module.choose(op, None, args, {}).name == "mine"  # type: ignore[union-attr]
    assert module.choose(op, "reference", args, {}).name == "reference", "explicit goes first"  # type: ignore[union-attr]
    assert module.choose(op, None, (*pair(), "gelu"), {}).name == "triton"  # type: ignore[union-attr]
    database.user_store().put(key, tuned(fastft.variants.get("glu", "mine"), source="0" * 12))
    database.forget()
    assert module.choose(op, None, args, {}).name == "triton", "of another source"  # type: ignore[union-attr]


def test_verified_is_of_this_source_and_device() -> None:
    fastft.variants.register("glu", "mine")(_mine.glu)
    mine = fastft.variants.get("glu", "mine")
    assert module.verified(fastft.variants.get("glu", "reference"), "h100")
    assert not module.verified(mine, "h100")
    module.note_verified(mine, "h100", True)
    assert module.verified(mine, "h100") and not module.verified(mine, "")
    assert not module.verified(module.Variant("glu", "mine", mine.call, mine.supported, source="0" * 64), "h100")
    module.note_verified(mine, "h100", False)
    assert not module.verified(mine, "h100")
