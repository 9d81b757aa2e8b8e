"""MLPs that a memory plan has computed a slice of tokens at a time: the same numbers, in every family and at every
level that recomputes them; nothing as wide as the MLP for all tokens; and a reason where one stays in one piece.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

import fastft
from fastft import costs, memory, planner
from fastft.kernels import lora_mlp
from fastft.memory import Memory
from fastft.planner import ALL, ALL_OFFLOADED, ATTENTION, CHEAP, KEEP, MLP
from tests.models import _families as families
from tests.models._training import Step, check_equal, compiled, step

TOKENS, WIDE = 48, 160


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices, of 8 tokens and more, and an MLP as wide as nothing else."""
    monkeypatch.setattr(lora_mlp, "FEWEST", 8)
    monkeypatch.setattr(lora_mlp, "SLICES", 3)
    monkeypatch.setitem(families._SIZES, "intermediate_size", WIDE)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every plan have this level, and slices or none."""

    def force(level: str, sliced: bool = True) -> None:
        def instead(self: Memory, cut: Any) -> Any:
            levels = [level] * cut.count
            HALVES[:] = [cut.at(levels, sliced).halves]
            return cut.at(levels, sliced).halves, self._plan(cut, levels, sliced)

        monkeypatch.setattr(Memory, "_planned", instead)

    return force


def batch(seq: int = TOKENS // 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, families.VOCAB, (2, seq), generator=torch.Generator().manual_seed(seq))
    return {"input_ids": ids, "labels": ids}


def run(network: nn.Module, **options: Any) -> Step:
    return step(network, batch(), call=compiled(network, **{"memory": "fast", "lazy_logits": False, **options}))


def the_plan() -> dict[str, Any]:
    (row,) = fastft.report().memory
    return row


class Calls:
    """Raw ops in both halves of the graph that was cut last, the tokens of their slices, and the widths of all that is
    there for all tokens.
    """

    def __init__(self, tokens: int = TOKENS) -> None:
        self.found, self.widths = Counter[str](), set[int]()
        self.rows: dict[str, set[int]] = {}
        for node in (n for half in HALVES[-1] for n in half.graph.nodes):
            self.found[getattr(node.target, "_opname", "")] += 1
            names = [a.name for a in node.target._schema.arguments] if hasattr(node.target, "_schema") else []
            if "rows" in names:
                self.rows.setdefault(node.target._opname, set()).add(node.args[names.index("rows")])
            for t in tree_iter(node.meta.get("val")):
                if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[:-1].numel() == tokens:
                    self.widths.add(t.shape[-1])


#: What plans were cut into.
HALVES: list[Any] = []


#: Every level with and without adapters, and every family with each.
FAMILIES = [
    *(("llama3", lora, level) for lora in (0.0, None) for level in (MLP, ATTENTION, ALL)),
    *(("qwen3", lora, level) for lora, level in ((0.0, MLP), (None, ALL))),
    *(("gemma2", lora, level) for lora, level in ((0.0, ATTENTION), (None, MLP), (None, ALL))),
]


@pytest.mark.parametrize(("family", "lora", "level"), FAMILIES)
def test_families(at: Any, family: str, lora: float | None, level: str) -> None:
    network = families.build(family, lora=lora, checkpointing=level == ALL)
    eager = step(network, batch())
    at(level, False)
    whole, calls = run(network), Calls()
    assert the_plan()["sliced"] == 0 == calls.found["lora_mlp"] and WIDE in calls.widths
    before = the_plan()["predicted"]
    at(level)
    sliced, calls = run(network), Calls()
    report = fastft.report()
    assert report.errors == [] and not report.missed, str(report)
    assert the_plan()["sliced"] == families.LAYERS
    plain = 0 if lora is not None else 2 + (family == "gemma2")  # the stream is added to the others' down
    assert report.counts.get("mlp_linears", 0) == plain * families.LAYERS
    assert f"the MLP by slices of 16 tokens in {families.LAYERS}" in report.plan["memory"]
    # Gemma's norm after the MLP reads its result in the backward.
    again = 1 + (family == "gemma2")
    for name, count in (("lora_mlp", again), ("lora_mlp_backward", 1), ("glu", 0), ("lora_glu", 0), ("lora_stack", 0)):
        assert calls.found[name] == count * families.LAYERS, name
    assert calls.rows == {"lora_mlp": {TOKENS}, "lora_mlp_backward": {TOKENS // 3}}
    assert not {w for w in calls.widths if w >= WIDE}, calls.widths
    assert the_plan()["predicted"] < before or lora is None  # gradients of weights are summed up in fp32
    check_equal(sliced, eager)
    check_equal(sliced, whole)


def test_levels_that_keep_the_mlp_have_no_slices(at: Any) -> None:
    network = families.build("llama3", lora=0.0)
    for level in (KEEP, CHEAP):
        at(level)
        run(network)
        assert the_plan()["sliced"] == 0
    at(ALL_OFFLOADED)
    check_equal(run(network, host_memory="1GiB"), step(network, batch()))
    assert the_plan()["sliced"] == families.LAYERS and the_plan()["host"] > 0


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(at: Any, adapter_dtype: torch.dtype) -> None:
    """bf16 products, beside the layers' own ops: adapters in fp32 as PEFT keeps them, or in bf16."""
    network = families.build("llama3", lora=0.0, checkpointing=True).to(torch.bfloat16)
    for name, parameter in network.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    results = []
    for sliced in (False, True):
        at(ALL, sliced)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(network))
        assert the_plan()["sliced"] == families.LAYERS * sliced, fastft.report().plan
    check_equal(results[1], results[0], relative=2e-2)
    assert all(g.dtype == dict(network.named_parameters())[n].dtype for n, g in results[1][1].items())


def test_nf4_weights(at: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    network = families.build("llama3", lora=0.0, checkpointing=True)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if name == "base_layer" and isinstance(child, nn.Linear):
                made = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                module.base_layer = made
    results = []
    for sliced in (False, True):
        at(ALL, sliced)
        results.append(run(network))
        assert fastft.report().errors == [] and the_plan()["sliced"] == families.LAYERS * sliced
    check_equal(results[1], results[0])


def test_dropout_stays_in_one_piece(at: Any) -> None:
    network = families.build("llama3", lora=0.3, checkpointing=True)
    at(ALL, False)
    whole = run(network)
    at(ALL)
    sliced = run(network)
    assert the_plan()["sliced"] == 0
    assert f"the MLP in one piece in {families.LAYERS} (dropout: " in fastft.report().plan["memory"]
    check_equal(sliced, whole, relative=0.0)


def test_few_tokens_are_one_piece(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_mlp, "FEWEST", TOKENS)
    at(ALL)
    run(families.build("llama3", lora=0.0))
    assert the_plan()["sliced"] == 0 and "MLP" not in fastft.report().plan["memory"].split("predicted")[0]


def test_a_variant_that_was_chosen_stays(at: Any) -> None:
    at(ALL)
    run(families.build("llama3", lora=0.0), variants={"lora_linears": "accumulated"})
    assert the_plan()["sliced"] == 0 and "(variant: " in fastft.report().plan["memory"], fastft.report().plan


def test_packed_gate_and_up_stay_in_one_piece(at: Any) -> None:
    at(ALL)
    run(families.build("phi4", lora=0.0))
    assert the_plan()["sliced"] == 0 and "(packed: " in fastft.report().plan["memory"], fastft.report().plan


class Layer(nn.Module):
    """A layer with an MLP. ``up_first``: up is computed before gate. ``shared``: somebody else reads the activation.
    ``apart``: down alone is checkpointed.
    """

    def __init__(self, up_first: bool = False, shared: bool = False, bias: bool = False, apart: bool = False) -> None:
        super().__init__()
        self.up_first, self.shared, self.apart = up_first, shared, apart
        self.gate, self.up = (nn.Linear(32, WIDE, bias=bias) for _ in range(2))
        self.down = nn.Linear(WIDE, 32, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up_first:
            up, gate = self.up(x), self.gate(x)
        else:
            gate, up = self.gate(x), self.up(x)
        act = nn.functional.silu(gate) * up
        y = checkpoint(self.down, act, use_reentrant=False) if self.apart else self.down(act)
        return x + y + (act.mean() if self.shared else 0)


class Layers(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**options) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def trained(network: nn.Module, x: torch.Tensor, call: Any = None) -> Step:
    network.zero_grad()
    y = (network if call is None else call)(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"up_first": True}, {"bias": True}, {"up_first": True, "bias": True}], ids=str)
@pytest.mark.parametrize("frozen", ["", "gate", "down", "gate up"])
def test_plain_layers(at: Any, options: dict[str, bool], frozen: str) -> None:
    """Trained and frozen weights: gradients of all that is trained, and of nothing else."""
    network, x = Layers(**options), torch.randn(2, 24, 32)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(f".{one}." in name for one in frozen.split()))
    eager = trained(network, x)
    at(ALL)
    got = trained(network, x, compiled(network, memory="fast"))
    wanted = 3 - (frozen == "gate up")  # nothing comes back to the first layer's gate
    assert the_plan()["sliced"] == wanted == Calls().found["lora_mlp_backward"] and fastft.report().errors == []
    # Without a bias, down is the stream's, which it adds to.
    assert fastft.report().counts["mlp_linears"] == (9 if options.get("bias") else 6)
    check_equal(got, eager)


def test_without_a_memory_plan_plain_layers_are_left() -> None:
    network = Layers()
    trained(network, torch.randn(2, 24, 32), compiled(network))
    assert "mlp_linears" not in fastft.report().counts


def test_an_activation_that_others_read_is_one_piece(at: Any) -> None:
    network, x = Layers(shared=True), torch.randn(2, 24, 32)
    eager = trained(network, x)
    at(ALL)
    check_equal(trained(network, x, compiled(network, memory="fast")), eager)
    assert the_plan()["sliced"] == 0 and " is also read by " in fastft.report().plan["memory"]


def test_an_mlp_in_two_regions_is_one_piece(at: Any) -> None:
    network, x = Layers(apart=True), torch.randn(2, 24, 32)
    eager = trained(network, x)
    at(ALL)
    check_equal(trained(network, x, compiled(network, memory="fast")), eager)
    assert the_plan()["sliced"] == 0 and "(checkpoint: " in fastft.report().plan["memory"], fastft.report().plan


def test_batches_of_other_sizes(at: Any) -> None:
    """The number of slices is that of the batch; also of one that is shorter than a slice."""
    network = Layers()
    at(ALL)
    call = torch.compile(network, backend="fastft", dynamic=True, options={"memory": "fast", "residual": "eager"})
    torch._dynamo.reset()
    fastft.reporting.reset()
    for tokens in (24, 100, 3, 25):
        x = torch.randn(2, tokens, 32)
        torch._dynamo.mark_dynamic(x, 1)
        check_equal(trained(network, x, call), trained(network, x))
    assert len(fastft.report().memory) == 1 and the_plan()["sliced"] == 3


def test_slices_are_for_what_does_not_fit_without(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Layers(), torch.randn(64, 64, 32)

    def planned(budget: Any) -> dict[str, Any]:
        trained(network, x, compiled(network, memory=budget, host_memory=0))
        assert fastft.report().errors == []
        return the_plan()

    vain, at = [], memory._Cut.at
    monkeypatch.setattr(memory._Cut, "at", lambda cut, of, sliced=True: vain.append(sliced) or at(cut, of, sliced))
    lean = planned("lean")
    assert lean["sliced"] > 0 and all(vain), "what clearly does not fit is not cut to see"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_mlp, "FEWEST", 10**9)
        whole = planned("lean")
    assert whole["sliced"] == 0 and lean["predicted"] < whole["predicted"]
    assert planned(lean["predicted"])["predicted"] <= lean["predicted"]
    assert planned(4 * whole["predicted"])["sliced"] == 0
    # All layers are recomputed, and that fits in one piece.
    monkeypatch.setattr(planner, "fastest", lambda problem, *_: [ALL] * len(problem.regions))
    kept = planned("auto")["predicted"]
    assert whole["predicted"] < kept
    fits = planned(kept - 1)
    assert fits["levels"] == {ALL: 3} and fits["sliced"] == 0
    assert not all(vain)


def test_explain_says_it() -> None:
    network = Layers()
    report = fastft.explain(network, torch.randn(64, 64, 32), options={"memory": "lean", "host_memory": 0})
    assert "the MLP by slices of " in report.plan["memory"] and report.memory[0]["sliced"] > 0


def test_what_is_computed_again_takes_its_time(at: Any) -> None:
    """Slices compute gate and up again, as a layer in one piece does."""
    network, x = Layers(), torch.randn(64, 64, 32)
    found = {}
    for sliced in (False, True):
        at(ALL, sliced)
        trained(network, x, compiled(network, memory="fast"))
        found[sliced] = the_plan()["seconds"]
    assert found[False] / 2 <= found[True] <= 2 * found[False]


@pytest.mark.slow
def test_under_inductor(at: Any) -> None:
    network = families.build("llama3", lora=0.0, checkpointing=True)
    at(ALL)
    check_equal(run(network, residual="inductor"), step(network, batch()))
    assert the_plan()["sliced"] == families.LAYERS and fastft.report().errors == []


# ------------------------------------------------------------------------------------------------------------- formulas


def called(target: Any, *args: Any, result: Any = None) -> Any:
    graph = torch.fx.Graph()

    def node(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(node, x))
        if not isinstance(x, torch.Tensor):
            return x
        made = graph.placeholder("x")
        made.meta["val"] = x
        return made

    call = graph.call_function(target, tuple(map(node, args)))
    call.meta["val"] = result
    return call


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_costs_of_raw_calls() -> None:
    x, gate, down = meta(1, 8192, 4096), meta(14336, 4096), meta(4096, 14336)
    a = [meta(16, 4096), meta(16, 4096), meta(16, 14336)]
    b = [meta(14336, 16), meta(14336, 16), meta(4096, 16)]
    layers = ([gate, gate, down], [], [], [64, 256] * 3, [None] * 3, [1] * 3, a, b, [None] * 3, [1.0] * 3)
    how = ("silu", True, torch.bfloat16, 2048)
    forward = called(torch.ops.fastft.lora_mlp.default, x, *layers, None, *how, result=x)
    needs = (True, [False] * 3, [False] * 3, [True] * 3, [True] * 3)
    backward = called(torch.ops.fastft.lora_mlp_backward.default, x, x, None, *layers, *how, *needs, result=[x])
    of_one = 2 * 8192 * 14336 * 4096 + 2 * 8192 * 16 * (14336 + 4096)
    assert costs.raw_work(forward, int, {}).flops == 3 * of_one + 8 * 8192 * 14336
    assert costs.raw_work(backward, int, {}).flops == 2 * of_one + 8 * 8192 * 14336  # what it computes again
    of_slice = 2 * 2048 * (2 * 4096 + 2 * 48)
    assert costs.scratch(forward)(int) == of_slice + 2 * 2048 * 3 * 14336
    assert costs.lasting(forward) is costs.lasting(backward) is None
    assert costs.scratch(backward)(int) == of_slice + 2 * 2048 * 4 * 14336
    stack = called(torch.ops.fastft.lora_stack.default, x, [gate, gate], [], [], [64, 256] * 2, a[:2], result=x)
    assert costs.raw_work(stack, int, {}).flops == 2 * 8192 * (2 * 14336 + 32) * 4096
    assert costs.scratch(stack)(int) == 0


def test_copies_of_weights_are_counted() -> None:
    x, packed, quant = meta(1, 8192, 64), meta(64 * 48, 1, dtype=torch.uint8), [meta(96, dtype=torch.float32)] * 3
    shape = [96, 64, 96, 64, 64, 96]
    layers = ([packed] * 3, quant, shape, [64, 256] * 3, [None] * 3, [0] * 3, [], [], [], [])
    mlp = called(torch.ops.fastft.lora_mlp.default, x, *layers, None, "silu", False, torch.bfloat16, 1024, result=x)
    assert costs.scratch(mlp)(int) == 2 * 1024 * (3 * 96 + 128) + 3 * 2 * 96 * 64
    stack = called(
        torch.ops.fastft.lora_stack.default, x, [packed] * 2, quant[:2], shape[:4], [64, 256] * 2, [], result=x
    )
    assert costs.scratch(stack)(int) == 2 * 2 * 96 * 64
