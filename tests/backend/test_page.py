"""The report as a page: everything that is in the report, its sums, and nothing that the model's author can put in."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import transformers
from typer.testing import CliRunner

import fastft
from fastft import cli, reporting
from fastft.kernels import attention, lora_glu, lora_stack, rms_norm, rotary
from fastft.kernels import linear_cross_entropy as loss
from fastft.kernels import lora_linear as lora
from fastft.page import LEFT, _amount, _bytes, _ranges, _time, page
from fastft.reporting import MISSED, REPLACED, SKIPPED, Module, Report, Site, Work

LAYERS, HIDDEN, MLP, HEADS, KV, HEAD, VOCAB, RANK = 3, 64, 96, 4, 2, 16, 128, 4
BATCH, LENGTH = 2, 32
TOKENS = BATCH * LENGTH
CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV, "use_cache": False,
}  # fmt: skip
FIELDS = ("flops", "bytes_moved", "bytes_kept")


class Page(HTMLParser):
    """A page's text and the attributes of its elements; raises where a tag is not closed, or closed twice."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def having(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes]


def numbers(row: dict[str, str], times: int = 1) -> list[int]:
    return [times * int(row[f"data-{name}"]) for name in ("flops", "moved", "kept")]


def rows(found: Page) -> dict[str, dict[str, str]]:
    return {row["data-pattern"]: row for row in found.having("data-pattern")}


def llama(rank: int = RANK) -> torch.nn.Module:
    torch.manual_seed(0)
    fields = {k: v for k, v in CONFIG.items() if k != "model_type"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).bfloat16()
    if rank:
        peft = pytest.importorskip("peft")
        adapters = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(TOKENS).view(BATCH, LENGTH) % VOCAB
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module")
def explained() -> Report:
    return fastft.explain(llama(), **batch())


@pytest.fixture(scope="module")
def found(explained: Report) -> Page:
    return Page(explained.to_html("tiny"))


def test_every_module_is_there(explained: Report, found: Page) -> None:
    shown = {row["data-module"] for row in found.having("data-module")}
    for number in ("0", "1"):  # the last is as the one before
        within = f"base_model.model.model.layers.{number}"
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert f"{within}.self_attn.{module}" in shown
        for module in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp", "self_attn", "input_layernorm"):
            assert f"{within}.{module}" in shown
    assert {s.module.replace("layers.2", "layers.1") for s in explained.sites} <= shown
    assert {"base_model.model.model.embed_tokens", "base_model.model.model.norm", "base_model.model.lm_head"} <= shown
    assert "with base_layer, lora_A.default, lora_B.default" in found.text
    rules = {s.rule for s in explained.sites}
    assert rules and all(rule in found.text for rule in rules)
    assert "in linear_cross_entropy" in found.text and "embedding" in found.text


def test_counts_are_the_reports(explained: Report, found: Page) -> None:
    assert {name: int(row["data-replaced"]) for name, row in rows(found).items()} == explained.counts
    assert explained.counts["lora"] == 7 * LAYERS
    assert str(sum(explained.counts.values())) in found.text


def gate_up_width() -> int:
    """Columns of gate, up, and what their adapters make of x, in whole numbers of 8."""
    return 2 * MLP + -(-2 * RANK // 8) * 8


def formulas() -> dict[str, list[list[Any]]]:
    """What each pattern's ops cost in one step, from the sizes of the model: its ops' formulas and how often."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    norm = rms_norm.cost(empty(BATCH, LENGTH, HIDDEN), None, 1e-6)
    q, k, v = (empty(BATCH, heads, LENGTH, HEAD) for heads in (HEADS, KV, KV))
    head = loss.cost(None, None, None, None)
    sizes = {"N": TOKENS, "H": HIDDEN, "V": VOCAB}
    head = type(head)(*(e.subs({s: sizes[s.name] for s in e.free_symbols}) for e in vars(head).values()))
    qkv = lora.cost_linears(TOKENS, (HEADS * HEAD, KV * HEAD, KV * HEAD), HIDDEN, RANK)
    o = lora.cost(TOKENS, HIDDEN, HIDDEN, RANK)
    a, b = [empty(RANK, HIDDEN)] * 2, [empty(MLP, RANK)] * 2
    gate_up = lora_stack.cost(empty(BATCH, LENGTH, HIDDEN), [empty(MLP, HIDDEN)] * 2, a)
    activation = lora_glu.cost(empty(BATCH, LENGTH, gate_up_width()), b, [1.0, 1.0], "silu")
    table = empty(1, LENGTH, HEAD)
    all_of: dict[str, list[tuple[int, Any]]] = {
        "rms_norm": [(1, norm)],  # and the first layer's, below
        "residual_norm": [(2 * LAYERS - 1, norm)],
        "rotary": [(LAYERS, rotary.cost(q, k, table, table))],
        "attention": [(LAYERS, attention.cost(q, k, v, causal=True))],
        "lora": [(LAYERS, o), (LAYERS, lora.cost(TOKENS, HIDDEN, MLP, RANK))],
        "joint_linears": [(LAYERS, qkv)],
        "mlp": [],  # all of them are lora_glu's
        "lora_glu": [(LAYERS, gate_up), (LAYERS, activation)],
        "linear_cross_entropy": [(1, head)],
    }
    sums = {
        name: [sympy.Integer(sum(n * getattr(cost, field) for n, cost in each)) for field in FIELDS]
        for name, each in all_of.items()
    }
    # Embeddings are frozen: the first norm's input has no gradient, so nothing is added there, and nothing kept.
    sums["rms_norm"] = [sums["rms_norm"][0] + norm.flops, sums["rms_norm"][1] + norm.bytes_moved, norm.bytes_kept]
    return sums


def test_sums_are_the_ops_formulas(found: Page) -> None:
    """An op is counted once, however many rewrites have made it what it is."""
    wanted = formulas()
    assert {name: numbers(row) for name, row in rows(found).items()} == wanted
    total = [sum(each) for each in zip(*wanted.values(), strict=True)]
    (row,) = [row for row in found.having("data-flops") if row.get("class") == "total"]
    assert numbers(row) == total
    # The layers' and the rest's, each as often as it is there.
    blocks = [numbers(block, int(block["data-times"])) for block in found.having("data-layers")]
    assert [sum(each) for each in zip(*blocks, strict=True)] == total


def test_layers_that_are_alike_are_shown_once(found: Page) -> None:
    # The first one's norm hands no stream on.
    blocks = [(block["data-layers"], block["data-times"]) for block in found.having("data-layers")]
    assert blocks == [("", "1"), ("0", "1"), ("1–2", "2"), ("", "1")]
    assert "layers 1–2 identical ×2" in found.text
    assert not any("layers.2" in row["data-module"] for row in found.having("data-module"))


def test_what_was_taken_up_says_by_what(found: Page) -> None:
    assert "→ joint_linears at self_attn.v_proj" in found.text
    assert "→ residual_norm" in found.text
    assert f"{5 * LAYERS} counted in a later pattern" in found.text  # q, k, v, gate, up


def test_linear_layers_of_inductors_are_counted_apart() -> None:
    found = Page(fastft.explain(llama(rank=0), **batch()).to_html())
    each = [lora.cost(TOKENS, n, HIDDEN) for n in (HEADS * HEAD, KV * HEAD, KV * HEAD, MLP, MLP)]
    assert numbers(rows(found)[LEFT]) == [LAYERS * sum(getattr(c, field) for c in each) for field in FIELDS]
    assert [block["data-layers"] for block in found.having("data-layers")] == ["", "0–2", ""]
    assert "in residual at the layer itself" in found.text


def test_other_layers_in_between_are_not_alike() -> None:
    works = [Work("op", n, n, n) for n in (1, 2, 1, 2, 1, 2, 1, 2)]
    sites = [Site("mlp", f"h.{i}.mlp", REPLACED, work=w) for i, w in enumerate(works)]
    found = Page(Report(sites=[*sites, Site("mlp", "g.0.mlp", REPLACED, work=works[0])], graphs=1).to_html())
    assert [(b["data-layers"], b["data-times"]) for b in found.having("data-layers")] == [
        ("0, 2, …, 6", "4"), ("1, 3, …, 7", "4"), ("0", "1"),
    ]  # fmt: skip


def test_layers_without_a_name() -> None:
    modules = [Module(str(i)) for i in range(12)] + [Module("12", {"linear": 1})]
    sites = [Site("rms_norm", str(i), REPLACED, work=Work("rms_norm", 1, 2, 3)) for i in range(12)]
    found = Page(Report(sites=sites, modules=modules, graphs=1).to_html())
    assert [(b["data-layers"], b["data-times"]) for b in found.having("data-layers")] == [("0–11", "12"), ("12", "1")]
    assert {row["data-module"] for row in found.having("data-module")} == {"0", "12"}


def test_a_model_that_dynamo_sees_through_arguments() -> None:
    sites = [Site("mlp", f"args.0.model.layers.{i}.mlp", REPLACED) for i in (0, 1)]
    found = Page(Report(sites=[*sites, Site("rms_norm", "args.0.model.norm", REPLACED)], graphs=1).to_html())
    assert [b["data-layers"] for b in found.having("data-layers")] == ["0–1", ""]
    assert "args.0.model.layers: layers 0–1" in found.text


def test_a_miss_in_one_layer_sets_it_apart() -> None:
    sites = [Site("mlp", f"layers.{i}.mlp", REPLACED, rule="mlp.py:1") for i in (0, 1, 3)]
    missed = [
        Site("mlp", f"layers.{i}.mlp", MISSED, f"escapes: add_{i} is also used by mul_{i}", "mlp.py:1") for i in (2, 4)
    ]
    found = Page(Report(sites=sites + missed, graphs=1).to_html())
    assert [b["data-layers"] for b in found.having("data-layers")] == ["0–1, 3", "2, 4"]
    # One row, the names of nodes aside.
    assert [row["data-sites"] for row in found.having("data-status")] == ["2"]
    assert "escapes: add_2 is also used by mul_2" in found.text


EVIL = '<script>alert("&1")</script><img src=x onerror=y>'


def test_everything_is_said_and_nothing_runs() -> None:
    report = Report(
        sites=[
            Site(EVIL + "a", f"layers.0.{EVIL}", REPLACED, rule=EVIL, notes=EVIL, work=Work(EVIL, problem=EVIL)),
            Site("mlp", f"{EVIL}.mlp", MISSED, f"shape: {EVIL}", rule="mlp.py:7"),
            Site("rotary", "", SKIPPED, "out of fuel"),
            Site("lora", "q", REPLACED, into=f"joint at {EVIL}"),
        ],
        graphs=1,
        breaks=3,
        recompiles=2,
        plan={EVIL: EVIL},
        timings={EVIL: 1.5},
        break_reasons={EVIL: 2, "": 1},
        errors=[EVIL],
        modules=[Module(f"m.{EVIL}", {EVIL: 2}, into=EVIL)],
        inputs=[EVIL],
        device=EVIL,
        bridges=fastft.report().bridges,
    )
    html = report.to_html(EVIL)
    found = Page(html)
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "img", "link", "iframe"})
    for said in (f"shape: {EVIL}", "mlp.py:7", "out of fuel", "×2: " + EVIL, "×1: no reason given", "trl_head"):
        assert said in found.text
    assert found.text.count(EVIL) > 12
    assert [(row["data-status"], row["data-sites"]) for row in found.having("data-status")] == [
        (MISSED, "1"), (SKIPPED, "1"),
    ]  # fmt: skip


def test_the_page_needs_nothing_else(explained: Report) -> None:
    html = explained.to_html()
    assert not re.search(r"https?://|//\w|src\s*=|href|url\(|@import|<script", html)
    assert "default-src 'none'" in html


def test_what_has_no_numbers_is_named() -> None:
    sites = [Site("mlp", "a", REPLACED, work=Work("glu", problem="no formula"))] * 2
    found = Page(Report(sites=[*sites, Site("mlp", "b", REPLACED, work=Work("glu", 8, 9, 1))], graphs=1).to_html())
    assert "glu ×2: no formula" in found.text and "2 without numbers" in found.text
    assert numbers(rows(found)["mlp"]) == [8, 9, 1]
    assert "unknown: no formula" in found.text


@pytest.mark.parametrize("report", [Report(), Report(graphs=1), Report(sites=[Site("p", "m", MISSED, "r")])])
def test_a_report_of_nothing_is_a_page(report: Report) -> None:
    found = Page(page(report))
    assert "fastft" in found.text and "None." in found.text


def test_what_was_trained_is_a_page() -> None:
    reporting.reset()
    torch._dynamo.reset()
    model = llama()
    before = fastft.explain(model, **batch())
    torch.compile(model, backend="fastft", options={"residual": "eager"})(**batch()).loss.backward()
    found = Page(fastft.report().to_html())
    assert {name: numbers(row) for name, row in rows(found).items()} == formulas()
    assert before.parts[0].inputs == fastft.report().parts[0].inputs == ["input_ids [2, 32]", "labels [2, 32]"]
    assert "input_ids [2, 32], labels [2, 32]" in found.text


def test_graphs_are_not_added_up() -> None:
    reporting.reset()
    again = [Site("mlp", "mlp", REPLACED, work=Work("glu", 10, 20, 30))]
    for recompiles in (0, 1, 1):
        reporting.add(Report(sites=again, graphs=1, recompiles=recompiles, inputs=["x [1]"]))
    found = Page(fastft.report().to_html())
    assert "Graph 1 of 3" in found.text and "Graphs 2–3 of 3" in found.text and "Compiled again" in found.text
    table, *graphs = found.having("data-pattern")
    assert (table["data-replaced"], "data-flops" in table) == ("3", False)
    assert [numbers(row) for row in graphs] == [[10, 20, 30]] * 2
    reporting.reset()


def test_the_device_is_said() -> None:
    sites = [Site("mlp", "m", REPLACED, work=Work("glu", 0, 3 * 10**9, 0))]
    known = Page(Report(sites=sites, device="NVIDIA H100 80GB HBM3").to_html()).text
    assert "estimate at the rates of NVIDIA H100 80GB HBM3, not measured: 750 TFLOP/s" in known
    assert "≥ 1 ms" in known
    other = Page(Report(sites=sites, device="NVIDIA T4").to_html()).text
    assert "estimate at H100 SXM rates, not measured" in other and "traced on NVIDIA T4" in other


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (_amount(0), "0 "), (_amount(999), "999 "), (_amount(999.6), "1 K"), (_amount(1.234e12), "1.23 T"),
        (_bytes(1024), "1.02 KB"), (_bytes(5e15), "5,000 TB"), (_time(0), "0"), (_time(4e-8), "40 ns"),
        (_time(0.25), "250 ms"), (_time(3), "3 s"), (_ranges([]), ""), (_ranges([4]), "4"), (_ranges([0, 1]), "0–1"),
        (_ranges([0, 1, 2, 4, 6, 7]), "0–2, 4, 6–7"), (_ranges([1, 3, 5, 7]), "1, 3, …, 7"),
    ],
)  # fmt: skip
def test_numbers_are_short(given: str, said: str) -> None:
    assert given == said


# --------------------------------------------------------------------------------------------------------- command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["explain", *arguments, "--layers", "1", "--length", "16"])


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_explain_writes_the_page_and_prints_json(config: str, tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    done = run(config, "--html", str(file), "--json")
    assert done.exit_code == 0, done.output
    assert f"wrote {file}" in done.stderr
    report = json.loads(done.stdout)
    found = Page(file.read_text(encoding="utf-8"))
    shown = {name: int(row["data-replaced"]) for name, row in rows(found).items()}
    # Without autocast the adapters multiply in fp32, and gate and up are not taken up by the activation.
    assert shown == {**report["counts"], "lora_glu": 0}
    assert "llama, 1 of 3 layers, hidden size 64, LoRA r=16, bfloat16" in found.text
    works = [site["work"] for site in report["sites"] if "work" in site]
    (total,) = [row for row in found.having("data-flops") if row.get("class") == "total"]
    assert numbers(total) == [sum(w[field] for w in works) for field in FIELDS]
    assert report["parts"][0]["inputs"] == ["input_ids [2, 16]"]


@pytest.mark.parametrize("where", ["no/such/page.html", ".", "config.json/page.html"])
def test_explain_refuses_what_cannot_be_written(config: str, where: str) -> None:
    file = Path(config) / where
    done = run(config, "--html", str(file))
    assert done.exit_code == 2
    assert done.stdout == ""  # before anything is built
    assert done.stderr.startswith(f"fastft: cannot write {file}: ") and done.stderr.count("\n") == 1


def test_a_page_that_cannot_be_written_after_all(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = run(config, "--html", str(Path(config) / "out.html"))
    assert done.exit_code == 2
    assert "rms_norm" in done.stdout and "No space left on device" in done.stderr
