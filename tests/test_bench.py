"""The benchmarks work: every model of the list can be built, a run gives its JSON, a failure is a row, not the end."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from unittest import mock

import pytest
import torch

import fastft
import fastft.kernels
from bench import context, implementations, running, setting, train
from bench.shapes import MODELS, PRIMARY, SHAPES, linears, shapes
from fastft import compiler, reporting
from fastft.kernels import rms_norm
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

SMALL = ["--model", "tiny", "--quant", "bf16", "--batch", "2", "--seq", "16", "--steps", "2", "--warmup", "1"]
#: What both a finished and a failed run say; and what only a finished one does.
ALWAYS = {"schema", "impl", "setup", "status", "error", "started", "commit", "argv"}
FIGURES = {"load_s", "first_step_s", "step_ms", "tokens_per_s", "peak_bytes", "loss", "device", "versions", "data"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    implementations.write_checkpoint("tiny", root / "tiny")
    return root


@pytest.fixture(autouse=True)
def _environment():
    with mock.patch.dict(os.environ):
        yield


def setup(impl: str, **changes) -> setting.Setup:
    return setting.Setup(
        impl=impl, **{"model": "tiny", "quant": "bf16", "batch": 2, "seq": 16, "steps": 2, "warmup": 1, **changes}
    )


# -- shapes


def test_shapes_are_named_apart():
    assert len({str(s) for s in SHAPES}) == len(SHAPES)


def test_every_op_of_the_list_has_small_and_primary_shapes():
    for op in {s.op for s in SHAPES}:
        assert shapes(op, tag="test"), op
        assert shapes(op, tag="primary"), op


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no shapes for op 'rmsnorm'.*rms_norm"):
        shapes("rmsnorm")
    with pytest.raises(KeyError, match=r"no shapes for model 'llama'.*llama-3.1-8b"):
        shapes(model="llama")
    with pytest.raises(KeyError, match="have no size 'width'"):
        shapes("rms_norm")[0]["width"]


@pytest.mark.parametrize("model", MODELS)
def test_linears_are_those_of_the_model(model):
    """The sizes in the list are what transformers builds from the same row (one layer, no memory)."""
    fields = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, **MODELS[model], "num_hidden_layers": 1}
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        )
    layer = built.model.layers[0]
    found = sorted(
        (n.split(".")[-1], m.out_features, m.in_features)
        for n, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear)
    )
    assert found == sorted(linears(model))


def test_every_op_is_benchmarked():
    from bench.kernels import MAKERS, _cases

    for tag in ("test", "primary", "real"):
        assert {name for name, *_ in _cases(tag)} == set(fastft.kernels.load())
    assert set(MAKERS) <= set(fastft.kernels.load())
    assert set(PRIMARY) <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_ops_are_in_the_list(model):
    """What is tuned for a model is what is measured at its name, in the form that ``inputs`` makes by default and in
    others.
    """
    from bench.kernels import shapes_of
    from fastft.kernels._inputs import Model

    if model not in {s.model for s in SHAPES}:
        pytest.skip("no rows: a model for tests")
    of = Model.of(MODELS[model], 4, 2048)
    for op in fastft.kernels.load().values():
        listed = [s.dims for s in shapes_of(op, model=model)]
        forms = {p.name for p in inspect.signature(op.inputs).parameters.values() if p.default is not p.empty}
        for sizes in op.sizes(of):
            sizes = {name: value for name, value in sizes.items() if name not in forms}
            assert sizes in listed, f"{op.name} is called with {sizes}, which no row of bench/shapes.py says"


# -- data

#: Two rows, each of four documents of 4 ± 2 tokens and one of what is left: 40 real tokens in every form.
DOCUMENTS = {"batch": 2, "seq": 20, "document": 4}


def first_batch(impl: str = "eager", **changes) -> dict[str, torch.Tensor]:
    return next(setting.batches(setup(impl, **{**DOCUMENTS, **changes}), "cpu"))


def test_documents_fill_every_row():
    rows = setting.documents(setup("eager", batch=64, seq=8192, document=512))
    lengths = [n for row in rows for n in row]
    assert all(sum(row) == 8192 for row in rows) and len(lengths) == 64 * 16
    assert 256 <= min(lengths) < 262 and 762 < max(lengths) <= 768
    assert statistics.pstdev(lengths) == pytest.approx(512 / 12**0.5, rel=0.05)  # each length as likely
    assert rows == setting.documents(setup("unsloth", batch=64, seq=8192, document=512, data="padded"))
    assert rows != setting.documents(setup("eager", batch=64, seq=8192, document=512, seed=1))
    assert [sum(row) for row in setting.documents(setup("eager", seq=7, document=4))] == [7, 7]
    assert [row[-1] for row in setting.documents(setup("eager", **DOCUMENTS))] == [4, 4]


def test_forms_hold_the_same_documents():
    """Full: the same tokens. Packed: positions begin again at each document, whose first token is no target. Padded:
    on the right, masked, no target.
    """
    full, packed, padded = (first_batch(data=data) for data in setting.DATA)
    assert torch.equal(packed["input_ids"], full["input_ids"]) and full["labels"] is full["input_ids"]
    begins = packed["position_ids"] == 0
    assert begins[:, 0].all() and torch.equal(packed["labels"] == -100, begins)
    assert torch.equal(packed["labels"][~begins], packed["input_ids"][~begins])
    real = padded["attention_mask"].bool()
    assert torch.equal(real, padded["attention_mask"].cummin(1).values.bool())
    assert torch.equal(padded["input_ids"][real], packed["input_ids"].flatten())
    assert torch.equal(real.sum(1), torch.diff(begins.flatten().nonzero().flatten(), append=torch.tensor([40])))
    assert torch.equal(padded["labels"] == -100, ~real) and (padded["input_ids"][~real] == setting.PAD).all()


def test_steps_differ_and_shapes_do_not():
    for data in ("packed", "padded"):
        steps = setting.batches(setup("eager", **DOCUMENTS, data=data), "cpu")
        found = [next(steps) for _ in range(4)]
        for name, value in found[0].items():
            assert len({tuple(step[name].shape) for step in found}) == 1
            assert not all(torch.equal(step[name], value) for step in found[1:])


def test_random_lengths():
    """From a quarter of --seq to all of it, each as likely, by the seed; the same for every implementation."""
    def found(impl: str, count: int = 400, **changes) -> list[int]:
        steps = setting.batches(setup(impl, seq=16, lengths="random", **changes), "cpu")
        shapes = [next(steps)["input_ids"].shape for _ in range(count)]
        assert {batch for batch, _ in shapes} == {2}
        return [seq for _, seq in shapes]

    lengths = found("eager")
    assert set(lengths) == set(range(4, 17)) and statistics.mean(lengths) == pytest.approx(10, abs=0.7)
    assert lengths == found("unsloth") and lengths != found("eager", seed=1)
    assert set(found("eager", 3, data="full")) != {16}


def test_ids_that_are_rarer_the_higher_they_are():
    """One of n ids is n times as rare as the first: of 508 in a vocabulary of 512 the first is 1 of 6.8."""
    ids = first_batch(tokens="zipf", batch=64, seq=512)["input_ids"]
    count = torch.bincount(ids.flatten(), minlength=512) / ids.numel()
    assert ids.min() == 4 and count.shape == (512,)
    harmonic = sum(1 / n for n in range(1, 509))
    assert torch.allclose(count[4:10], torch.tensor([1 / n / harmonic for n in range(1, 7)]), rtol=0.1)
    assert not torch.equal(ids, first_batch(tokens="zipf", batch=64, seq=512, seed=1)["input_ids"])


def test_unsloth_gets_one_row_and_its_lengths():
    rows, row = first_batch(data="packed"), first_batch("unsloth", data="packed")
    assert row.pop("packed_seq_lengths").tolist() == first_batch(data="padded")["attention_mask"].sum(1).tolist()
    assert row.keys() == rows.keys()
    assert all(torch.equal(row[name], value.reshape(1, -1)) for name, value in rows.items())
    assert "packed_seq_lengths" not in first_batch("unsloth", data="padded")


def test_loss_of_packed_and_padded_is_the_same(checkpoints):
    """In fp32 to the last digits; documents that see each other are further away than that."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "tiny", dtype=torch.float32)
    model.config.use_cache = False  # as in training; with a cache, transformers looks for no documents
    packed, padded, row = (
        first_batch(i, data=d) for i, d in (("eager", "packed"), ("eager", "padded"), ("unsloth", "packed"))
    )
    loss = model(**packed).loss.item()
    assert loss == pytest.approx(model(**padded).loss.item(), abs=2e-6)
    assert loss == pytest.approx(model(**row).loss.item(), abs=2e-6)
    del packed["position_ids"]
    assert loss != pytest.approx(model(**packed).loss.item(), abs=1e-4)


# -- one run


@pytest.mark.parametrize(("impl", "options"), [("eager", {}), ("fastft", {"residual": "eager", "strict": True})])
def test_run(impl, options, checkpoints):
    result = running.run(setup(impl, options=options), checkpoints)
    assert result["status"] == "ok", result["error"]
    assert set(result) >= ALWAYS | FIGURES
    assert json.loads(json.dumps(result)) == result
    assert len(result["loss"]) == 3 and len(result["step_ms"]["all"]) == 2
    # Random weights know nothing: the first loss is that of a uniform guess, about.
    assert result["loss"][0] == pytest.approx(torch.tensor(512.0).log().item(), abs=0.1)
    assert result["setup"]["checkpointing"] is True
    if impl == "fastft":
        assert result["report"]["graphs"] > 0
        assert any(site["status"] == "replaced" for site in result["report"]["sites"])


def test_a_run_says_what_compiling_took(checkpoints):
    """By torch's phases; Dynamo alone is what no backend's first step can take less than. Eager compiles nothing."""
    torch._dynamo.reset()
    result = running.run(setup("dynamo"), checkpoints)
    assert result["status"] == "ok", result["error"]
    seconds = list(result["compile_s"].values())
    assert seconds == sorted(seconds, reverse=True) and min(seconds) >= 0.1
    assert max(seconds) == result["compile_s"]["_compile.compile_inner"] < result["first_step_s"] + 0.01
    assert "compile_s" not in running.run(setup("eager"), checkpoints)


def test_run_of_random_lengths(checkpoints):
    """Tokens/s are of all measured steps; graphs are counted after each: one, one of any length, and no more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    changes = {"lengths": "random", "seq": 24, "steps": 6, "warmup": 2, "options": {"residual": "eager"}}
    result = running.run(setup("fastft", **changes), checkpoints)
    assert result["status"] == "ok", result["error"]
    lengths = result["lengths"]
    assert len(lengths) == len(result["graphs"]) == 8 and len(set(lengths)) > 2
    assert result["graphs"] == [1] + [2] * 7
    seconds = sum(result["step_ms"]["all"]) / 1e3
    assert result["tokens_per_s"] == pytest.approx(2 * sum(lengths[2:]) / seconds, rel=1e-3)
    eager = running.run(setup("eager", **{**changes, "options": {}}), checkpoints)
    assert eager["lengths"] == lengths and "graphs" not in eager
    assert result["loss"] == pytest.approx(eager["loss"], abs=5e-3)

    compared = train.compared({"fastft": [result, result], "eager": [eager]}, 2, "eager")
    row, other = compared["rows"]
    assert row["tokens_per_s"] == result["tokens_per_s"]
    assert [train.graphs_of(row), train.graphs_of(other)] == ["2, from step 2 on", ""]
    assert [train.late_of(row), train.late_of(other)] == 2 * ["0 in 0.0 s"], "on a CPU"
    some = {"kernels": [9, 0, 3, 1, 3], "seconds": [5.0, 0.0, 1.0, 0.25, 4.7]}
    assert train.late_of({**row, "triton": some}) == "4 in 5.0 s"
    assert train.late_of({"runs": [{}], "triton": some}) == ""
    assert [c.header for c in train.table(compared, "").columns][-4:-2] == ["graphs", "Triton's after step 3"]
    assert train.tokens_of(result["setup"]) == "2×6 to 24 tokens"


def test_adam_in_8_bits(checkpoints):
    pytest.importorskip("bitsandbytes")
    changes = {"train": "full", "optimizer": "adamw8bit", "lr": 1e-2, "steps": 4}
    of = {
        name: running.run(setup("eager", **{**changes, "optimizer": name}), checkpoints) for name in setting.OPTIMIZERS
    }
    assert of["adamw"]["loss"][:2] == of["adamw8bit"]["loss"][:2] and of["adamw"]["loss"] != of["adamw8bit"]["loss"]
    made = running._optimizer(setup("eager", **changes), [torch.zeros(4096, requires_grad=True)])
    assert type(made).__name__ == "AdamW8bit"
    assert train.optimizer_of(of["adamw8bit"]["setup"]) == ", AdamW in 8 bits"
    assert train.optimizer_of(of["adamw"]["setup"]) == ""


def test_implementations_see_the_same_data_and_weights(checkpoints):
    eager, fast = (
        running.run(setup(i, options=o), checkpoints) for i, o in (("eager", {}), ("fastft", {"residual": "eager"}))
    )
    assert fast["loss"][0] == pytest.approx(eager["loss"][0], abs=5e-3)


@pytest.mark.parametrize("data", ["packed", "padded"])
def test_documents_in_every_form(data, checkpoints):
    """One loss whatever the form and the implementation; fastft knows the form and builds no mask of it."""
    packed = running.run(setup("eager", **DOCUMENTS, data="packed"), checkpoints)
    torch._dynamo.reset()
    fast = running.run(setup("fastft", **DOCUMENTS, data=data, options={"residual": "eager"}), checkpoints)
    assert packed["status"] == fast["status"] == "ok"
    assert fast["loss"] == pytest.approx(packed["loss"], abs=1e-3)
    shape = list(first_batch(data=data)["input_ids"].shape)
    assert fast["data"] == packed["data"] | {"form": data, "shape": shape}
    assert fast["data"]["real_tokens"] == 40 and fast["data"]["targets"] == 40 - fast["data"]["documents"]
    assert fast["tokens_per_s"] == pytest.approx(40 / fast["step_ms"]["median"] * 1e3, rel=1e-3)

    *_, report = fastft.reports()
    attention = [site for site in report.sites if site.pattern == "attention"]
    known = {"packed": "causal & packed[", "padded": "causal & padding["}[data]
    assert len(attention) == 2 and all(site.status == "replaced" and known in site.notes for site in attention)
    (part,) = report.to_dict()["parts"]
    (left,) = [p["left"] for p in part["left"] if p["path"] == "base_model.model.model"]
    assert set(left) <= {"arange", "add"}, "where the model makes its mask, nothing of it is left"


def test_full_training_trains_every_parameter(checkpoints):
    full = running.run(setup("eager", train="full", checkpointing=False), checkpoints)
    adapters = running.run(setup("eager", rank=4, checkpointing=False), checkpoints)
    assert full["status"] == adapters["status"] == "ok"
    # 2 layers: attention 2 · 64 · 64 + 2 · 64 · 32, MLP 3 · 64 · 176, two norms; embeddings, head, last norm.
    assert full["trained_parameters"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176 + 2 * 64) + 2 * 512 * 64 + 64
    assert adapters["trained_parameters"] == 2 * 4 * sum(o + i for _, o, i in linears("tiny"))


@pytest.mark.parametrize(("trained", "optimizer"), [("lora", "adamw"), ("full", "adamw8bit")])
def test_steps_of_sft_trainer(trained, optimizer, checkpoints, monkeypatch):
    """The same data, weights and figures as stock TRL's; fastft is in the steps, TRL's head among them."""
    pytest.importorskip("trl", minversion="1.16")
    from torch._dynamo.backends.registry import _COMPILER_FNS

    torch._dynamo.reset()
    reporting.reset()
    quick = functools.partial(compiler.fastft, options={"residual": "eager"})
    monkeypatch.setitem(_COMPILER_FNS, "fastft", quick)  # Inductor would take half a minute
    changes = {"trainer": "sft", "train": trained, "optimizer": optimizer, "rank": 4, "warmup": 2}
    eager, fast = (running.run(setup(impl, **changes), checkpoints) for impl in ("eager", "fastft"))
    for result in (eager, fast):
        assert result["status"] == "ok", result["error"]
        assert set(result) >= ALWAYS | FIGURES and json.loads(json.dumps(result)) == result
        assert len(result["loss"]) == 4 and len(result["step_ms"]["all"]) == 2 and len(result["warmup_ms"]) == 1
    assert fast["loss"][0] == pytest.approx(eager["loss"][0], abs=5e-3)
    assert eager["trained_parameters"] == fast["trained_parameters"]
    replaced = {site["pattern"] for site in fast["report"]["sites"] if site["status"] == "replaced"}
    assert "linear_cross_entropy" in replaced and ("lora" in replaced) == (trained == "lora")


def test_profile_lists_what_took_time(checkpoints):
    result = running.run(setup("eager"), checkpoints, profile=True, timeline=True)
    assert result["kernels"] and {"name", "calls", "ms"} <= set(result["kernels"][0])
    if not torch.cuda.is_available():
        assert "no memory history of a CPU" in result["timeline_note"]


def test_idle_times():
    ran = [(100.0, 400.0, "a"), (350.0, 380.0, "beside"), (410.0, 1000.0, "b"), (1500.0, 2000.0, "c")]
    found = running.idle(ran[::-1], 2.4)
    assert found.pop("copying") == {"ms": 0, "largest": []}
    assert found == {
        "wall_ms": 2.4,
        "busy_ms": 1.39,
        "outside_ms": 0.5,
        "gaps_ms": 0.51,
        "short_ms": 0.01,
        "largest": [{"ms": 0.5, "after": "b", "before": "c"}, {"ms": 0.01, "after": "a", "before": "b"}],
    }
    copies = [(390.0, 405.0, "Memcpy DtoH (Device -> Pinned)"), (900.0, 1300.0, "Memcpy HtoD (Pinned -> Device)")]
    found = running.idle([*ran, *copies], 2.4)
    assert found["busy_ms"] == 1.695 and found["copying"] == {
        "ms": 0.305,
        "largest": [
            {"ms": 0.3, "at_ms": 0.9, "after": "b", "before": "c"},
            {"ms": 0.005, "at_ms": 0.3, "after": "a", "before": "b"},
        ],
    }


def test_a_failure_is_a_result(checkpoints):
    result = running.run(setup("fastft", options={"no_such_option": 1}), checkpoints)
    assert result["status"] == "failed" and "no_such_option" in result["error"]
    assert set(result) >= ALWAYS and "traceback" in result


def test_xformers_that_cannot_load_is_a_failure(checkpoints, monkeypatch):
    """A row that says which library is missing, and none that measured other attention under the name."""

    def cannot(path, mode):
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(implementations.ctypes, "CDLL", cannot)
    result = running.run(setup("unsloth_xformers"), checkpoints)
    assert result["status"] == "failed" and "pip install nvidia-cuda-runtime-cu12 (libcudart.so.12" in result["error"]

    monkeypatch.setattr(implementations.ctypes, "CDLL", lambda path, mode: None)
    modules = {
        name: types.ModuleType(name) for name in ("unsloth", "unsloth.utils", "unsloth.utils.attention_dispatch")
    }
    monkeypatch.setattr(implementations, "load_unsloth", lambda *_: pytest.fail("loaded without xformers"))
    modules["unsloth.utils.attention_dispatch"].HAS_XFORMERS = False
    with mock.patch.dict(sys.modules, modules):
        result = running.run(setup("unsloth_xformers"), checkpoints)
    assert result["status"] == "failed" and "no xformers that works here" in result["error"]


def test_cuda_12_is_taken_from_where_pip_puts_it(tmp_path, monkeypatch):
    loaded = []
    library = tmp_path / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(implementations.ctypes, "CDLL", lambda path, mode: loaded.append(path))
    monkeypatch.setattr(implementations, "import_unsloth", lambda: loaded.append("unsloth"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    dispatch = types.ModuleType("unsloth.utils.attention_dispatch")
    dispatch.HAS_XFORMERS = True
    packages = {name: types.ModuleType(name) for name in ("unsloth", "unsloth.utils")}
    with mock.patch.dict(sys.modules, {**packages, dispatch.__name__: dispatch}):
        implementations.import_unsloth_with_xformers()
    assert loaded == [str(library), "unsloth"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "unslot"}, "--impl is 'unslot'; it is one of eager"),
        ({"model": "llama"}, "--model is 'llama'; it is one of llama-3.1-8b"),
        ({"quant": "nf4", "train": "full"}, "NF4 weights have no gradient"),
        ({"warmup": 0}, "--warmup is 0; it is 1 or more"),
        ({"data": "packt"}, "--data is 'packt'; it is one of full, packed, padded"),
        ({"document": 0}, "--document is 0; it is 1 or more"),
        ({"tokens": "text"}, "--tokens is 'text'; it is one of uniform, zipf"),
        ({"lengths": "short"}, "--lengths is 'short'; it is one of fixed, random"),
        ({"lengths": "random", "data": "packed"}, "--lengths random is of --data full"),
        ({"lengths": "random", "trainer": "sft"}, "--lengths random is of --data full"),
        ({"optimizer": "sgd"}, "--optimizer is 'sgd'; it is one of adamw, adamw8bit"),
        ({"lr": 0.0}, "--lr is 0.0; it is above 0"),
        ({"options": {"a": 1}}, "--impl eager does not call"),
        ({"trainer": "dpo"}, "--trainer is 'dpo'; it is one of loop, sft"),
        ({"trainer": "sft", "impl": "unsloth"}, "--impl with --trainer sft is 'unsloth'; it is one of eager, inductor"),
        ({"trainer": "sft", "impl": "fastft", "options": {"a": 1}}, "to which SFTConfig passes none"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        setup(**{"impl": "eager", **changes}).check()


# -- several beside each other


def test_compare_prints_a_table_and_records_failures(checkpoints, tmp_path):
    out = tmp_path / "compared.json"
    command = [sys.executable, train.__file__, "compare", "--impls", "eager", "fastft:no_such_option=1", *SMALL]
    done = subprocess.run(
        [*command, "--checkpoints", str(checkpoints), "--out", str(out), "--log", str(tmp_path / "log")],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "eager" in done.stdout and "no_such_option" in done.stdout
    compared = json.loads(out.read_text())
    eager, failed = compared["rows"]
    assert eager["status"] == "ok" and eager["speed_ratio"] == 1.0 and eager["tokens_per_s"] > 0
    assert failed["status"] == "failed" and "no_such_option" in failed["error"]
    assert compared["baseline"] == "eager" and compared["device"]["cores"] and eager["runs"][0]["versions"]["torch"]
    assert "===== eager =====" in (tmp_path / "log").read_text()


def test_compare_of_documents(checkpoints, tmp_path, capsys, monkeypatch):
    """Each row says what it was given; the title, what the tokens are."""
    asked = []

    def apart(arguments, impl, **_):
        parsed = train._parser().parse_args(["run", *arguments])
        asked.append((parsed.impl, parsed.data, parsed.options))
        own = setup(parsed.impl, data=parsed.data, document=parsed.document, seq=parsed.seq)
        said = {"status": "ok", "error": None, "setup": dataclasses.asdict(own), "loss": [2.0], "peak_bytes": None}
        data = setting.described(own, next(setting.batches(own, "cpu")))
        return {**said, "step_ms": {"all": [10.0]}, "tokens_per_s": 4000.0, "first_step_s": 1.0, "data": data}

    monkeypatch.setattr(train, "run_apart", apart)
    impls = ["unsloth", "unsloth:data=padded", "fastft:fuel=3;data=full"]
    given = [*SMALL, "--seq", "20", "--document", "4", "--data", "packed", "--checkpoints", str(checkpoints)]
    assert train.main(["compare", "--impls", *impls, *given, "--out", str(tmp_path / "out.json")]) == 0
    assert asked == [("unsloth", "packed", []), ("unsloth", "padded", []), ("fastft", "full", [("fuel", 3)])]
    shown, longest = capsys.readouterr().out, max(map(max, setting.documents(setup("eager", **DOCUMENTS))))
    assert "2×20 real tokens in documents of 4 ± 2, no device" in shown
    assert "packed 1×40" in shown and f"padded 10×{longest}" in shown
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["tokens_per_s"] for row in rows] == [4000.0] * 3 and rows[1]["data"]["form"] == "padded"


def test_a_run_that_takes_too_long_is_ended(checkpoints, tmp_path):
    with open(tmp_path / "log", "w") as log:
        arguments = ["--impl", "eager", "--checkpoints", str(checkpoints), *SMALL, "--warmup", "1000000"]
        result = train.run_apart(arguments, "eager", peers=None, caches=tmp_path, timeout=6, log=log)
        late = train.run_apart(arguments, "eager", peers=None, caches=tmp_path, timeout=0, log=log)
    assert result["status"] == "failed" and result["error"] == "timed out after 6 s"
    assert result["argv"][-2:] == ["--seconds", "-2.0"], "before that it begins no step that would end too late"
    assert late["status"] == "failed" and "not started" in late["error"]
    with open(tmp_path / "log", "w") as log:
        looked = train.run_apart([*arguments, "--profile"], "eager", peers=None, caches=tmp_path, timeout=5, log=log)
    assert looked["argv"][-1] == "-33.0", "one more step takes its time"


def test_a_run_whose_time_is_up_keeps_what_it_measured(checkpoints, monkeypatch):
    monkeypatch.setattr(running, "STARTED", time.monotonic())
    result = running.run(setup("eager", steps=1000000, warmup=2), checkpoints, seconds=8)
    done = len(result["step_ms"]["all"])
    assert result["status"] == "ok" and 0 < done < 1000000
    assert result["cut_short"] == f"ended after {done} of 1000000 steps: its time (8 s) was up"
    assert len(result["loss"]) == 2 + done
    found = train.compared({"eager": [result]}, 1, "eager")
    assert result["cut_short"] in train.table(found, "a title").caption


@pytest.mark.skipif(INTERPRET or not HAS_TRITON or torch.cuda.is_available(), reason="Triton's compiler without a GPU")
def test_what_triton_compiles_is_counted(tmp_path, monkeypatch):
    from triton import knobs

    from tests.kernels._hopper import compiling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", None)
    found = running.Compilations()
    for columns in (1111, 1111, 2222):
        with compiling(rms_norm):
            torch.ops.fastft.rms_norm(torch.randn(4, columns), torch.randn(columns), 1e-6, 0.0, None)
    assert [name for name, _ in found.found] == ["_forward_kernel"] * 2
    kernels, seconds = found.since(1)
    assert kernels == 1 and 0.0 < seconds < 60.0 and found.since(2) == (0, 0.0)
    times = types.SimpleNamespace(total=1e6)
    for name, counts in (("fastft-compiles", False), ("pt_autograd_0", True)):
        before = len(found.found)
        beside = threading.Thread(target=lambda: found(src=None, times=times, cache_hit=False), name=name)
        beside.start()
        beside.join()
        assert len(found.found) - before == counts, "no step waits for what is compiled beside it"


@pytest.mark.parametrize("impl", ["inductor", "dynamo", "fastft"])
def test_dynamic_is_an_argument_of_its_own(impl):
    model, compiles = mock.Mock(), implementations.IMPLEMENTATIONS[impl].compile
    compiles(model, {"dynamic": True, "memory": "auto"})
    compiles(model, {})
    first, second = (call.kwargs for call in model.compile.call_args_list)
    assert first["dynamic"] is True and first["options"] == {"memory": "auto"}
    assert second["dynamic"] is None and second["options"] is None
    assert first.get("backend") == {"dynamo": "eager", "fastft": "fastft"}.get(impl)


def test_steps_of_sft_trainer_end_when_the_time_is_up(checkpoints, monkeypatch):
    pytest.importorskip("trl", minversion="1.16")
    monkeypatch.setattr(running, "time_is_up", lambda setup, times, seconds, result: len(times) == 3)
    result = running.run(setup("eager", trainer="sft", rank=4, steps=9, warmup=2), checkpoints, seconds=1)
    assert result["status"] == "ok" and len(result["step_ms"]["all"]) == 3 and len(result["loss"]) == 5


def test_no_step_is_begun_that_would_end_too_late(monkeypatch):
    monkeypatch.setattr(running, "STARTED", time.monotonic() - 10.0)
    for times, seconds, up in (([], 5.0, False), ([900.0], 12.0, False), ([900.0], 11.0, True), ([9e9], None, False)):
        result = {}
        assert running.time_is_up(setup("eager"), times, seconds, result) == up == bool(result)


def test_rounds_are_merged():
    def one(times, peak, first):
        same = {"status": "ok", "error": None, "setup": {"batch": 2, "seq": 10}, "loss": [2.0, 1.0]}
        return {**same, "step_ms": {"all": times}, "peak_bytes": peak, "first_step_s": first}

    row = train.merge("eager", [one([10.0, 30.0], 5, 9.0), one([20.0], 7, 1.0)])
    assert row["step_ms"]["median"] == 20.0 and row["tokens_per_s"] == 1000.0
    assert row["peak_bytes"] == 7 and row["first_step_s"] == 9.0 and row["first_step_warm_s"] == 1.0
    assert (row["loss_first"], row["loss_last"]) == (2.0, 1.0)


def test_arguments(capsys):
    assert train._specs(["eager,inductor", "fastft:disable=rotary,attention;fuel=3"]) == [
        "eager", "inductor", "fastft:disable=rotary,attention;fuel=3",
    ]  # fmt: skip
    assert train.option("fuel=3") == ("fuel", 3) and train.option("residual=eager") == ("residual", "eager")
    assert train.chosen("unsloth") == ("unsloth", None, [])
    assert train.chosen("fastft:fuel=3;data=padded") == ("fastft", "padded", ["fuel=3"])
    for impls, message in (
        ("eager,nobody", "'nobody'; it is one of"),
        ("eager:data=pad", "--data is 'pad'; it is one"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main(["compare", "--impls", impls])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# -- the longest context


@pytest.mark.parametrize(
    ("asked", "bisect", "most", "wanted", "tried"),
    [
        ([4096, 8192], 0, 10**6, 8192, [4096, 8192]),
        ([8192, 4096, 65536, 131072], 0, 9000, 8192, [4096, 8192, 65536]),
        ([8192, 65536], 2, 40000, 36864, [8192, 65536, 36864, 51200]),
        ([8192], 3, 3000, 2048, [8192, 4096, 2048, 3072]),
        ([2048, 3072], 3, 2500, 2048, [2048, 3072]),
        ([2048], 1, 10, None, [2048, 1024]),
    ],
)
def test_lengths_are_tried_until_one_does_not_fit(asked, bisect, most, wanted, tried):
    found = []

    def fits(tokens: int) -> bool:
        found.append(tokens)
        return tokens <= most

    assert context.lengths(asked, bisect, fits) == wanted and found == tried


def test_context(checkpoints, tmp_path, monkeypatch):
    """A row for each length, with the plan for it; out of memory ends it."""
    steps = context.Context._steps

    def short(self, tokens):
        if tokens > 32:
            raise torch.OutOfMemoryError("no room\nfor it")
        return steps(self, tokens)

    monkeypatch.setattr(context.Context, "_steps", short)
    out = tmp_path / "context.json"
    given = ["--model", "tiny", "--quant", "bf16", "--rank", "4", "--tokens", "24,48", "--host", "1GiB"]
    more = ["--options", "residual=eager", "--checkpoints", str(checkpoints), "--out", str(out), "--cap", "1GiB"]
    assert context.main([*given, *more]) == 0
    result = json.loads(out.read_text())
    first, second = result["rows"]
    assert result["longest"] == 24 and result["cap_bytes"] == 2**30 and result["options"]["memory"] == "lean"
    assert first["status"] == "ok" and len(first["loss"]) == len(first["step_s"]) == 1
    assert first["plans"][0]["said"].startswith("lean: ") and first["plans"][0]["errors"] == []
    assert second["status"] == "out of memory" and second["error"] == "no room" and second["loss"] == []
    assert first["host_peak_bytes"] > 2**20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tokens", "many"], "many"),
        (["--tokens", "1"], "2 tokens or more"),
        (["--tokens", "8", "--cap", "8 Gb"], "option cap is '8 Gb'"),
        (["--tokens", "8", "--impl", "nobody"], "'nobody'; it is one of"),
        (["--tokens", "8", "--steps", "0"], "--steps is 0"),
    ],
)
def test_context_that_cannot_be(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        context.main(given)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
