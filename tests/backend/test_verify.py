"""fastft.verify and options={"verify": "first_step"}: right models pass, broken kernels are named, training goes on."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastft
from fastft import reporting, verifying
from fastft.compare import assert_within, bitwise
from fastft.judging import VerificationError, Wide
from tests.models._families import batch, build
from tests.models._training import step

EAGER = {"residual": "eager", "strict": True}


def tiny(layers: int = 1) -> Any:
    """A small Llama, quick to trace: bisecting compiles it again and again."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


#: Losses and final weights.
Training = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reporting.reset()


# ---------------------------------------------------------------------------------------------------- kernels, broken


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a mistake into a kernel's raw op: ``mistake(results, arguments)`` returns other results."""

    def put(file: str, op: str, mistake: Callable[[Any, Any], Any]) -> None:
        import importlib

        module = importlib.import_module(f"fastft.kernels.{file}")
        right = getattr(module, op)
        monkeypatch.setattr(module, op, lambda *args: mistake(right(*args), args))

    return put


def sign(results: Any, args: Any) -> Any:
    return -results[0], *results[1:]


def percent(results: Any, args: Any) -> Any:
    return 1.01 * results[0], *results[1:]


def dropped_rows(results: Any, args: Any) -> Any:
    wrong = results[0].clone()
    wrong[..., 5:6, :] = 0
    return wrong, *results[1:]


def bf16_sum(results: Any, args: Any) -> Any:
    """The second gradient (a weight's) rounded on the way."""
    return results[0], results[1].bfloat16().to(results[1].dtype), *results[2:]


# -------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    ("dtype", "lora", "checkpointing"),
    [
        (torch.float32, None, False),
        (torch.float32, 0.1, True),
        (torch.bfloat16, None, True),
        (torch.bfloat16, 0.1, True),
    ],
)
def test_a_right_model_is_ok(dtype: torch.dtype, lora: float | None, checkpointing: bool) -> None:
    model = build("llama3", dtype=dtype, lora=lora, checkpointing=checkpointing)
    result = fastft.verify(model, batch("padding"), options=EAGER)
    assert result.ok, str(result)
    assert {row.name for row in result.rows} == {"loss", *(n for n, p in model.named_parameters() if p.requires_grad)}
    assert result.replaced["rms_norm"] == 5
    assert (result.dtype, result.exact) == (dtype, torch.float64 if dtype == torch.float32 else torch.float32)
    assert result.blame is None and result.cause == ""
    assert any("dropout" in note for note in result.notes) == (lora is not None)
    # The reference is more exact than eager, and dropout masks are the same in it: else eager's error would be large.
    worst = max(row.torch_error for row in result.rows)
    assert worst < (2e-6 if dtype == torch.float32 else 0.1), str(result)


@pytest.mark.slow
def test_through_inductor() -> None:
    model = build("llama3", dtype=torch.bfloat16, lora=0.1, checkpointing=True)
    result = fastft.verify(model, **batch("padding"))
    assert result.ok, str(result)


def test_under_autocast() -> None:
    """fp32 weights, bf16 arithmetic: judged as bf16, against fp32 without autocast."""
    model = build("llama3")
    with torch.autocast("cpu", torch.bfloat16):
        result = fastft.verify(model, batch(), options=EAGER)
        assert torch.is_autocast_enabled("cpu")
    assert result.ok, str(result)
    assert (result.dtype, result.exact) == (torch.bfloat16, torch.float32)
    assert 1e-3 < max(row.torch_error for row in result.rows) < 0.1


def test_attention_dropout() -> None:
    model = build("llama3")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    result = fastft.verify(model, batch(), options=EAGER)
    assert result.ok and any("dropout" in note for note in result.notes), str(result)
    assert "attention" not in result.replaced and any("was left as it is" in note for note in result.notes)
    assert result.replaced["rotary"] == 2


def test_nf4() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = build("llama3", dtype=torch.bfloat16)
    for layer in model.model.layers:
        for part, names in (
            (layer.self_attn, "q_proj k_proj v_proj o_proj"),
            (layer.mlp, "gate_proj up_proj down_proj"),
        ):
            for name in names.split():
                dense = getattr(part, name)
                packed = bitsandbytes.nn.Linear4bit(
                    dense.in_features, dense.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                packed.weight = bitsandbytes.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
                setattr(part, name, packed.to("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    result = fastft.verify(model, batch(), options=EAGER)
    assert result.ok, str(result)
    assert result.exact == torch.float32 and result.replaced["lora"] == 14


MISTAKES = {
    "rms_norm: sign": ("rms_norm", "_raw_backward", sign, "rms_norm"),
    "rms_norm: factor": ("rms_norm", "_raw_backward", percent, "rms_norm"),
    "rms_norm: dweight": ("rms_norm", "_raw_backward", bf16_sum, "rms_norm"),
    "rms_norm: forward": ("rms_norm", "_raw", percent, "rms_norm"),
    "glu: sign": ("glu", "_raw_backward", sign, "mlp"),
    "glu: factor": ("glu", "_raw_backward", percent, "mlp"),
    "glu: rows": ("glu", "_raw_backward", dropped_rows, "mlp"),
    "attention: sign of dq": ("attention", "_raw_backward", sign, "attention"),
    "loss: factor": ("linear_cross_entropy", "_forward_op", percent, "linear_cross_entropy"),
    "rotary: sign": ("rotary", "_raw_backward", sign, "rotary"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_broken_kernel_is_found_and_named(name: str, broken: Callable[..., None]) -> None:
    file, op, mistake, pattern = MISTAKES[name]
    broken(file, op, mistake)
    result = fastft.verify(tiny(), batch(), options=EAGER)
    assert not result.ok
    assert result.blame is not None and result.blame.pattern == pattern, str(result)
    assert result.blame.rule in result.cause and "is the first wrong one" in result.cause
    assert "WRONG" in str(result) and result.cause.split(",")[0] in str(result)


@pytest.mark.parametrize("mistake", [sign, percent, dropped_rows])
def test_a_broken_kernel_is_found_in_bf16(mistake: Any, broken: Callable[..., None]) -> None:
    broken("rms_norm", "_raw_backward", mistake)
    result = fastft.verify(tiny().bfloat16(), batch(), options=EAGER, bisect=False)
    assert not result.ok
    assert result.blame is None and result.cause == ""


def test_the_one_wrong_site_of_many_is_named(broken: Callable[..., None]) -> None:
    """One of five norms is wrong: the bisection ends at this one."""
    model = tiny(layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    target = model.model.layers[1].input_layernorm.weight.detach().clone()

    def once(results: Any, args: Any) -> Any:
        here = isinstance(args[2], torch.Tensor) and torch.equal(args[2], target)
        return sign(results, args) if here else results

    broken("rms_norm", "_raw_backward", once)
    result = fastft.verify(model, batch(), options=EAGER)
    assert result.blame is not None
    assert (result.blame.pattern, result.blame.module) == ("rms_norm", "model.layers.1.input_layernorm")
    right = {row.name for row in result.rows if row.ok}
    assert "lm_head.weight" in right and "model.layers.1.mlp.up_proj.weight" in right
    assert "model.layers.0.mlp.up_proj.weight" not in right


def test_fuel_counts_over_the_graphs_of_a_model(broken: Callable[..., None]) -> None:
    """The wrong norm is in the second graph."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = transformers.models.llama.modeling_llama.LlamaRMSNorm(8), torch.nn.Module()
            self.second.norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8)
            torch.nn.init.normal_(self.second.norm.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x) ** 3
            torch._dynamo.graph_break()
            return self.second.norm(x.sin()).square().mean()

    model = Model()
    broken(
        "rms_norm",
        "_raw_backward",
        lambda results, args: sign(results, args) if torch.equal(args[2], model.second.norm.weight) else results,
    )
    result = fastft.verify(model, torch.randn(50, 8), options=EAGER)
    assert result.replaced == {"rms_norm": 2}
    assert "rewrite 2 is the first wrong one" in result.cause and "second.norm" in result.cause, str(result)


def test_inductor_is_blamed_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gm: Any, inputs: Any, patches: Any) -> Any:
        assert patches["fallback_random"]
        return lambda *args: tuple(1.1 * x if isinstance(x, torch.Tensor) else x for x in gm.forward(*args))

    monkeypatch.setattr("fastft._torch_compat.compile_with_inductor", wrong)
    result = fastft.verify(tiny(), batch())
    assert not result.ok and result.blame is None
    assert "Inductor" in result.cause


def test_a_graph_that_is_wrong_without_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.normalise import normalise

    def wrong(gm: torch.fx.GraphModule, **options: Any) -> Any:
        for node in gm.graph.nodes:
            if node.target is F.silu:
                node.target = F.relu
        return normalise(gm, **options)

    monkeypatch.setattr("fastft.compiler.normalise", wrong)
    result = fastft.verify(tiny(), batch(), options=EAGER)
    assert not result.ok and result.blame is None
    assert result.cause.startswith("no rewrite")


@pytest.mark.parametrize("how", ["stock", "compiled", "compiled in place"])
def test_the_model_is_left_as_it_was(how: str) -> None:
    model = build("llama3", lora=0.1)
    step(model, batch())  # gradients that are there must stay
    model.register_buffer("seen", torch.zeros(1))
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        model.seen += 1
        return forward(*args, **kwargs)

    model.forward = counting
    model.base_model.model.model.norm.eval()
    asked: Any = model
    if how == "compiled":
        asked = torch.compile(model, backend="fastft", options=EAGER)
    elif how == "compiled in place":
        model.compile(backend="fastft", options=EAGER)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    values = {n: g.clone() for n, g in grads.items() if g is not None}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    fired: list[str] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    torch.manual_seed(3)
    state = torch.get_rng_state()

    assert fastft.verify(asked, **batch(), options=EAGER).ok

    assert torch.equal(torch.get_rng_state(), state)
    assert all(bitwise(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(torch.equal(grads[n], g) for n, g in values.items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert (model._compiled_call_impl is not None) == (how == "compiled in place")
    assert fastft.reports() == [] and fired == []
    loss = asked(**batch()).loss
    loss.backward()
    assert bool(fastft.reports()) == (how != "stock")


def test_everything_is_given_back_after_an_error() -> None:
    model = tiny()
    model.compile(backend="fastft")
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="input_ids"):
        fastft.verify(model, nonsense=1)
    assert model._compiled_call_impl is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input() -> None:
    model = build("llama3")
    with pytest.raises(ValueError, match="without a loss to differentiate: give it labels"):
        fastft.verify(model, input_ids=batch()["input_ids"], options=EAGER)
    with pytest.raises(ValueError, match="did you mean 'fuel'"):
        fastft.verify(model, batch(), options={"fule": 1})
    with pytest.raises(ValueError, match="nothing to verify"):
        fastft.verify(model.requires_grad_(False), batch())


@pytest.mark.parametrize(
    "give", [lambda x: x, lambda x: (x, x), lambda x: {"loss": x}], ids=["scalar", "tuple", "dict"]
)
def test_losses(give: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.unused = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> Any:
            return give(self.linear(x).square().mean())

    result = fastft.verify(Model(), torch.randn(3, 4), options=EAGER)
    assert result.ok, str(result)
    assert {row.name for row in result.rows} == {"loss", "linear.weight", "linear.bias", "unused"}
    assert "nothing was replaced" in str(result)


def test_as_json_and_as_a_table(broken: Callable[..., None]) -> None:
    broken("rms_norm", "_raw_backward", lambda results, args: (torch.full_like(results[0], torch.nan), *results[1:]))
    result = fastft.verify(tiny(), batch(), options=EAGER)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert not found["ok"] and found["blame"]["pattern"] == "rms_norm"
    assert (found["dtype"], found["exact"]) == ("float32", "float64")
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["loss"]["ok"] and not rows["model.embed_tokens.weight"]["ok"]
    assert rows["model.embed_tokens.weight"]["error"] is None
    text = str(result)
    assert "fastft: verify, float32 against float64" in text and "model.embed_tokens.weight" in text
    right = [row for row in result.rows if row.ok]
    many = verifying.Verification((right * 100)[: verifying.SHOWN + 7], result.dtype, result.exact)
    assert "7 more rows, 0 of them wrong" in str(many)


# ---------------------------------------------------------------------------------------------------------- first step


def train(call: Any, model: torch.nn.Module, steps: int = 3, **data: Any) -> Training:
    """Losses and final weights of a few steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    torch.manual_seed(5)
    for number in range(steps):
        optimizer.zero_grad()
        loss = call(**batch("padding", seed=number), **data).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def first_step(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="fastft", options={"residual": "eager", "verify": "first_step", **options})


def same(ours: Training, eager: Training) -> None:
    assert all(bitwise(a, b) for a, b in zip(ours[0], eager[0], strict=True)), (ours[0], eager[0])
    assert all(bitwise(w, eager[1][n]) for n, w in ours[1].items())


@pytest.mark.parametrize(
    ("dtype", "lora", "checkpointing"),
    [(torch.float32, None, False), (torch.bfloat16, 0.1, True)],
)
def test_a_right_graph_stays_compiled(dtype: torch.dtype, lora: float | None, checkpointing: bool) -> None:
    models = [build("llama3", dtype=dtype, lora=lora, checkpointing=checkpointing) for _ in range(3)]
    verified = train(first_step(models[0], strict=True), models[0])
    report = fastft.report()
    assert "first step right" in report.plan["verify"] and report.counts["rms_norm"] == 5, str(report)
    assert report.errors == []
    # The check changes nothing: neither this step's numbers nor the random numbers of those that follow.
    torch._dynamo.reset()
    same(verified, train(first_step(models[1], verify="never"), models[1]))
    assert "verify" not in fastft.reports()[-1].plan


@pytest.mark.slow
def test_a_right_graph_stays_compiled_by_inductor() -> None:
    model = build("llama3", dtype=torch.bfloat16, lora=0.1, checkpointing=True)
    train(first_step(model, residual="inductor", strict=True), model)
    assert "first step right" in fastft.report().plan["verify"]


@pytest.mark.parametrize(
    ("file", "op", "mistake", "pattern", "lora"),
    [
        ("rms_norm", "_raw_backward", sign, "rms_norm", True),
        ("glu", "_raw_backward", percent, "mlp", False),
        ("rms_norm", "_raw", percent, "rms_norm", False),  # the loss itself is wrong
    ],
)
def test_a_wrong_graph_falls_back(
    file: str, op: str, mistake: Any, pattern: str, lora: bool, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """From the very first step, all gradients are eager's, dropout masks included; the site is named, once."""
    broken(file, op, mistake)
    models = [build("llama3", lora=0.1, checkpointing=True) if lora else tiny() for _ in range(2)]
    eager = train(models[0], models[0])
    with caplog.at_level(logging.WARNING, "fastft"):
        ours = train(first_step(models[1]), models[1])
    torch.testing.assert_close(ours[0][0], eager[0][0], rtol=1e-6, atol=0)  # compiled, if this much was right
    same((ours[0][1:], ours[1]), (eager[0][1:], eager[1]))
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "fastft"]
    assert "is wrong and runs uncompiled from now on" in warning and f"Cause: {pattern} in " in warning
    report = fastft.report()
    assert report.counts == {}
    (site,) = [s for s in report.sites if s.status == "missed"]
    assert site.pattern == pattern and site.module and site.reason.startswith("verify: ")
    assert {s.reason for s in report.sites if s.status == "skipped"} == {
        "verify: its graph was wrong and runs uncompiled"
    }
    assert len(report.errors) == 1 and site.rule in report.errors[0]
    assert "error: verify: " in str(report)


def test_strict_raises(broken: Callable[..., None]) -> None:
    broken("rms_norm", "_raw_backward", sign)
    model = tiny()
    with pytest.raises(VerificationError, match=r"rms_norm in model\.norm"):
        train(first_step(model, strict=True), model, steps=1)


def test_evaluation_is_verified_too(broken: Callable[..., None]) -> None:
    model = tiny().eval()
    data = batch()
    with torch.no_grad():
        torch.testing.assert_close(first_step(model)(**data).logits, model(**data).logits)
        assert fastft.report().plan["verify"] == "first step right"
        torch._dynamo.reset()
        reporting.reset()
        broken("glu", "_raw", lambda result, args: 1.01 * result)
        assert bitwise(first_step(model)(**data).logits, model(**data).logits)
    assert "mlp in model.layers.0.mlp" in fastft.report().errors[0]


def test_every_graph_has_its_first_step() -> None:
    """A second length is a second graph."""
    model = tiny()
    call = first_step(model, strict=True)
    for length in (20, 30):
        call(**batch(length=length)).loss.backward()
    plans = [one.plan["verify"] for one in fastft.reports()]
    assert len(plans) == 2 and all("first step right" in plan for plan in plans)


def test_gradients_that_overflow_decide_nothing(broken: Callable[..., None]) -> None:
    """As with a loss scale that is still too large: the next step is the one that is checked."""
    broken("rms_norm", "_raw_backward", sign)
    model = tiny()
    call = first_step(model)
    (call(**batch()).loss * 3e38 * 10).backward()
    assert "verify" not in fastft.report().plan
    model.zero_grad()
    call(**batch()).loss.backward()
    assert fastft.report().plan["verify"] == "first step wrong, the graph runs uncompiled"


def test_a_check_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*args: Any) -> Any:
        raise MemoryError("no room for the reference")

    monkeypatch.setattr("fastft.first_step.verdicts", fails)
    models = [tiny() for _ in range(2)]
    with caplog.at_level(logging.WARNING, "fastft"):
        ours = train(first_step(models[0]), models[0])
    assert caplog.messages == ["fastft could not verify a graph: MemoryError: no room for the reference"]
    assert fastft.report().plan["verify"] == "first step not verified: MemoryError: no room for the reference"
    torch._dynamo.reset()
    same(ours, train(first_step(models[1], verify="never"), models[1]))
    torch._dynamo.reset()
    with pytest.raises(MemoryError):
        train(first_step(models[0], strict=True), models[0], steps=1)


def test_a_graph_that_writes_to_its_inputs_is_left_alone() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 4)
    for call in (first_step(models[0]), models[1]):
        call(x).square().sum().backward()
    torch.testing.assert_close(models[0][1].running_mean, models[1][1].running_mean)
    torch.testing.assert_close(models[0][0].weight.grad, models[1][0].weight.grad)
    assert "writes to its inputs" in fastft.report().plan["verify"]


def test_logits_of_a_verified_step_carry_gradients() -> None:
    """Somebody's own loss, from logits that are lazy otherwise."""
    model = tiny()
    data = batch()

    def gradient(call: Any, model: Any = model) -> torch.Tensor:
        model.zero_grad()
        call(**data).logits.float().logsumexp(-1).mean().backward()
        return model.model.embed_tokens.weight.grad.clone()

    wanted = gradient(model)
    wide = copy.deepcopy(model).double()
    with Wide(torch.float64, torch.float32):
        exact = gradient(wide, wide)
    call = first_step(model, strict=True)
    for _ in range(2):
        assert_within("gradient", gradient(call), wanted, exact, length=64)
    assert "first step right" in fastft.report().plan["verify"]


# ------------------------------------------------------------------------------------------------------------ reference


def test_wide_replaces_dtypes() -> None:
    x = torch.randn(4, dtype=torch.float64)
    with Wide(torch.float64, torch.float32):
        assert {y.dtype for y in (x.float(), x.to(torch.bfloat16), x.half(), x.to(dtype=torch.float32))} == {x.dtype}
        assert torch.zeros(2, dtype=torch.float16).dtype == torch.float64
        assert F.softmax(x, dim=0, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.int32).dtype == torch.int32
        assert torch.zeros(4, dtype=torch.uint8).view(torch.float32).dtype == torch.float32
    assert x.float().dtype == torch.float32


def test_wide_leaves_autocast_as_it_found_it() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with Wide(torch.float32, torch.bfloat16):
            assert (x @ x).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_wide_draws_the_narrow_masks(p: float) -> None:
    x = torch.randn(100, dtype=torch.bfloat16).requires_grad_()
    torch.manual_seed(0)
    narrow = F.dropout(x, p)
    torch.manual_seed(0)
    with Wide(torch.float32, torch.bfloat16):
        wide = F.dropout(x.detach().float().requires_grad_(), p)
    assert torch.equal(narrow == 0, wide == 0)
    torch.testing.assert_close(wide, narrow.float(), rtol=1e-2, atol=0)
    with Wide(torch.float32, torch.bfloat16):
        assert F.dropout(x, p, training=False) is x
