"""The command line: what each command prints, its exit code, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastft import cli, doctor
from fastft.doctor import BROKEN, OK, WARNING, Check

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def fastft(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_lists_the_commands() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "fastft", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert all(command in found for command in ("bench", "demo", "doctor", "explain", "tune", "verify"))


def test_an_unknown_command_is_refused() -> None:
    assert fastft("nope").exit_code == 2


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARNING, 0), (BROKEN, 1)])
def test_doctor_exit_code(monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    row = Check("triton", status, "3.0 [odd]", "" if status == OK else "pip install triton")
    monkeypatch.setattr(doctor, "diagnose", lambda: [Check("python", OK, "3.11"), row])
    table = fastft("doctor")
    assert table.exit_code == code
    assert "3.0 [odd]" in table.output
    assert ("→ pip install triton" in table.output) == (status != OK)
    assert ("Broken: triton." in table.output) == (status == BROKEN)
    as_json = fastft("doctor", "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.output) == {
        "ok": status != BROKEN,
        "checks": [{"name": "python", "status": OK, "found": "3.11", "fix": ""}, vars(row)],
    }


def test_explain_counts_what_a_config_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    found = fastft("explain", str(tmp_path), "--layers", "1", "--length", "16", "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["counts"]["rms_norm"] == 3
    assert report["breaks"] == 0
    assert "1 of 4 layers" in found.stderr


def test_explain_prints_the_table(tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    found = fastft(
        "explain",
        str(config),
        "--layers",
        "0",
        "--lora",
        "0",
        "--checkpointing",
        "--dtype",
        "float32",
        "--length",
        "16",
    )
    assert found.exit_code == 0, found.output
    assert "rms_norm" in found.stdout
    assert "4 checkpointed regions" in found.stdout


def test_explain_cuts_lists_that_have_an_entry_for_each_layer(tmp_path: Path) -> None:
    gemma = {**TINY, "model_type": "gemma2", "head_dim": 16, "sliding_window": 8}
    gemma["layer_types"] = ["sliding_attention", "full_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps(gemma))
    network = cli._build(cli._config(tmp_path), 2, None)
    assert network.config.layer_types == ["sliding_attention", "full_attention"]
    assert len(network.model.layers) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a model's name on a hub is not looked up"),
        ("{", "is not JSON"),
        ("[1]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": "no_such_model"}', "cannot read"),
        ('{"model_type": "vit"}', "ViT"),
    ],
)
def test_explain_refuses_what_is_no_language_model(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    found = fastft("explain", str(tmp_path))
    assert found.exit_code == 2
    assert says in found.stderr


def test_explain_refuses_an_unknown_dtype(tmp_path: Path) -> None:
    found = fastft("explain", str(tmp_path), "--dtype", "int8")
    assert found.exit_code == 2
    assert "bfloat16, float16 or float32" in found.stderr


def test_verify_compares_every_gradient(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    arguments = ("verify", str(tmp_path), "--layers", "1", "--length", "16", "--lora", "4", "--residual", "eager")
    found = fastft(*arguments, "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["ok"] and result["replaced"]["lora"] == 7
    assert len(result["rows"]) == 1 + 2 * 7
    # Nothing is trivially right: fresh adapters are zero on one side, and so is the other side's gradient.
    assert all(row["torch_error"] > 0 for row in result["rows"])


def test_verify_fails_when_a_gradient_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.kernels import rms_norm

    right = rms_norm._raw_backward
    monkeypatch.setattr(rms_norm, "_raw_backward", lambda *args: (-right(*args)[0], right(*args)[1]))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    arguments = ("--layers", "1", "--length", "16", "--lora", "0", "--dtype", "float32", "--residual", "eager")
    found = fastft("verify", str(tmp_path), *arguments)
    assert found.exit_code == 1
    assert "WRONG" in found.stdout and "cause: rms_norm in model.norm" in found.stdout
    found = fastft("verify", str(tmp_path), *arguments, "--no-bisect")
    assert found.exit_code == 1
    assert "WRONG" in found.stdout and "cause" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--residual", "none"), "inductor or eager"), (("--dtype", "int8"), "bfloat16, float16 or")],
)
def test_verify_refuses_bad_options(tmp_path: Path, arguments: tuple[str, str], says: str) -> None:
    found = fastft("verify", str(tmp_path), *arguments)
    assert found.exit_code == 2
    assert says in found.stderr


def test_demo_without_the_repository_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastft" / "cli.py"))
    found = fastft("demo")
    assert found.exit_code == 2
    assert "Clone the repository" in found.stderr


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "trl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else object())
    found = fastft("demo")
    assert found.exit_code == 2
    assert "this needs trl" in found.stderr


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module examples/demo.py."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    return demo


def test_demo_refuses_no_steps(demo: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.arguments(["--steps", "0"])
    assert stop.value.code == 2


def test_demo_compares_the_same_seed_and_the_same_step(demo: Any) -> None:
    def run(label: str, seed: int, *loss: float) -> dict[str, Any]:
        return {"run": label, "seed": seed, "loss": list(loss)}

    runs = [
        run("eager", 0, 5.0, 4.0),
        run("eager", 1, 5.2, 4.1),
        run("fastft", 0, 5.0, 4.5),
        run("fastft", 2, 9.0, 9.0),
    ]
    assert demo.compare(runs, "fastft") == pytest.approx(
        {
            "mean_gap_to_eager": 0.25,
            "max_gap_to_eager": 0.5,
            "mean_spread_of_eager_seeds": 0.15,
            "max_spread_of_eager_seeds": 0.2,
        }
    )
    assert demo.compare(runs[:1], "fastft") == {}


def test_the_demos_text_is_documentation(demo: Any) -> None:
    pairs = demo.python_docs.pairs()
    assert len(pairs) > 2000
    assert all(pair["prompt"].strip() and pair["completion"].strip() for pair in pairs)
    assert pairs == demo.python_docs.pairs()
    wrap = next(pair for pair in pairs if pair["prompt"].startswith("What does textwrap.wrap("))
    assert wrap["completion"].startswith("Wrap a single paragraph of text")
    tokenizer = demo.python_docs.tokenizer((pair["completion"] for pair in pairs), vocab_size=512)
    assert tokenizer.decode(tokenizer("naïve → text")["input_ids"]) == "naïve → text"


@pytest.mark.slow
def test_the_demo_trains_both_ways_to_the_same_losses(
    demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = demo.Size(
        64, 96, 1, 4, 2, pretrain_steps=2, pretrain_learning_rate=1e-3, steps=3, batch=2, learning_rate=1e-3
    )
    monkeypatch.setitem(demo.SIZES, "5m", tiny)
    found = fastft("demo", "--params", "5m", "--steps", "3", "--out", str(tmp_path), "--no-nf4")
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "losses.json").read_text())
    eager, compiled = result["runs"]
    assert (eager["run"], compiled["run"]) == ("eager", "fastft")
    assert len(eager["loss"]) == 3
    # The Trainer logs four digits; on a GPU, in bf16, the two round differently.
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=2e-2 if result["device"] != "cpu" else 2e-4)
    assert "rms_norm" in (tmp_path / "report.txt").read_text()
    assert (tmp_path / "losses.png").stat().st_size > 5000
    assert (tmp_path / "adapter-fastft" / "adapter_model.safetensors").is_file()
