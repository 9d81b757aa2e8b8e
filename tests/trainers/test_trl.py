"""TRL's trainers as they come, LoRA and QLoRA: no graph break, few graphs, every site replaced, eager's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402

import fastft  # noqa: E402
from fastft.compare import compare, relative_error  # noqa: E402
from tests.trainers import _tiny as tiny  # noqa: E402
from tests.trainers.conftest import Calls  # noqa: E402

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=tiny.TARGETS)
#: Sites of one graph of the tiny model, all of them.
SITES = {
    "linear_cross_entropy": 1,
    "ignored_tokens": 1,
    "rms_norm": 2 * tiny.LAYERS + 1,
    "rotary": tiny.LAYERS,
    "attention": tiny.LAYERS,
    "mlp": tiny.LAYERS,
    "lora": 7 * tiny.LAYERS,
    "joint_linears": 2 * tiny.LAYERS,
    "lora_glu": tiny.LAYERS,
    "residual_norm": 2 * tiny.LAYERS,
}


def lengths() -> Dataset:
    """Sequences of many lengths, so that every batch has its own."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, tiny.VOCAB, (8 + 3 * i,), generator=generator).tolist() for i in range(10)]
    return Dataset.from_dict({"input_ids": ids})


def quantise(model: Any, compute: torch.dtype) -> Any:
    """What loading with a bitsandbytes NF4 config makes of a model."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=compute, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def all_replaced(report: fastft.Report, nf4: bool, widened: bool = False) -> None:
    """No graph break, and in every graph exactly ``SITES``, with LoRA over NF4 weights or over plain ones.

    ``widened``: layers compute in bf16 and give fp32, as their input was; the activation takes up none of those.
    """
    assert report.breaks == 0 and not report.errors, str(report)
    assert {s.pattern for s in report.missed} == ({"lora_glu"} if widened else set()), str(report)
    sites = {pattern: n for pattern, n in SITES.items() if not (widened and pattern == "lora_glu")}
    assert report.counts == {pattern: n * report.graphs for pattern, n in sites.items()}, str(report)
    notes = {site.notes for site in report.sites if site.pattern == "lora"}
    assert notes == {"NF4 weight" if nf4 else ""}, str(report)


def sft(folder: Path, *, compiled: bool, nf4: bool = False, steps: int = 4, **more: Any) -> tiny.Run:
    run = tiny.Run()
    model = tiny.llama()
    if nf4:
        model = quantise(model, torch.bfloat16 if more.get("bf16") else torch.float32)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would make the gradients of A zero
            torch.nn.init.normal_(parameter, std=0.1)
    if compiled:
        model.compile(backend="fastft")
    args = trl.SFTConfig(**tiny.arguments(folder, **{"max_steps": steps, **more}))
    trainer = trl.SFTTrainer(
        model, args, train_dataset=lengths(), processing_class=tiny.tokenizer(), callbacks=[tiny.Watch(run)]
    )
    assert args.gradient_checkpointing
    if not args.bf16:  # TRL makes the adapters of a quantised model bf16: the same values in fp32
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    return run


@pytest.mark.parametrize("nf4", [False, True])
def test_defaults(calls: Calls, tmp_path: Path, nf4: bool) -> None:
    run = sft(tmp_path, compiled=True, nf4=nf4, bf16=True)
    report = fastft.report()
    assert calls.count == 4 and report.graphs in (1, 2), str(report)
    all_replaced(report, nf4, widened=nf4)
    eager = sft(tmp_path, compiled=False, nf4=nf4, bf16=True)
    # The truth is the same run in fp32.
    exact = sft(tmp_path, compiled=False, nf4=nf4, bf16=False)
    assert run.gradients.keys() == eager.gradients.keys()
    results = [compare(n, g, eager.gradients[n], exact.gradients[n]) for n, g in run.gradients.items()]
    assert all(r.ok for r in results), "\n".join(str(r) for r in results if not r.ok)


def test_fp32_losses_of_every_step(calls: Calls, tmp_path: Path) -> None:
    run = sft(tmp_path, compiled=True, bf16=False)
    eager = sft(tmp_path, compiled=False, bf16=False)
    assert run.losses == pytest.approx(eager.losses, rel=1e-5)
    assert fastft.report().breaks == 0


def test_through_inductor(fresh: None, tmp_path: Path) -> None:
    """The backend as it comes, with Inductor, over NF4 weights and with checkpointing. In fp32, where there is a bound
    for the losses; the learning rate makes the second one depend on the first step's gradients.
    """
    more: dict[str, Any] = {"nf4": True, "bf16": False, "steps": 2, "learning_rate": 1e-2}
    run = sft(tmp_path, compiled=True, **more)
    report = fastft.report()
    all_replaced(report, nf4=True)
    assert torch._dynamo.utils.counters["inductor"], "Inductor compiled nothing"
    eager = sft(tmp_path, compiled=False, **more)
    assert len(run.losses) == 2 and run.losses == pytest.approx(eager.losses, rel=1e-5)
    assert run.gradients.keys() == eager.gradients.keys() and run.gradients
    errors = {n: relative_error(g, eager.gradients[n]) for n, g in run.gradients.items()}
    assert max(errors.values()) <= 1e-5, str(errors)


def test_packing(calls: Calls, tmp_path: Path) -> None:
    more: dict[str, Any] = {"packing": True, "max_length": 48, "bf16": False, "steps": 2}
    run = sft(tmp_path, compiled=True, **more)
    eager = sft(tmp_path, compiled=False, **more)
    assert run.losses == pytest.approx(eager.losses, rel=1e-5)
    assert fastft.report().breaks == 0 and calls.count == 2


def dpo(folder: Path, *, compiled: bool) -> tiny.Run:
    run = tiny.Run()
    model: Any = tiny.llama()
    model = torch.compile(model, backend="fastft") if compiled else model

    def words(start: int, count: int) -> str:
        return " ".join(f"w{3 + (7 * start + 5 * i) % 120}" for i in range(count))

    rows = [{"prompt": words(i, 4), "chosen": words(i + 1, 6), "rejected": words(i + 2, 6)} for i in range(8)]
    args = trl.DPOConfig(**tiny.arguments(folder, bf16=False))
    trl.DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        peft_config=LORA,
        callbacks=[tiny.Watch(run)],
    ).train()
    return run


def test_dpo(calls: Calls, tmp_path: Path) -> None:
    run = dpo(tmp_path, compiled=True)
    report = fastft.report()
    # Each step calls the model twice: with the adapter, and without it for the reference.
    assert calls.count == 2 * tiny.STEPS and report.breaks == 0, str(report)
    eager = dpo(tmp_path, compiled=False)
    assert run.losses == pytest.approx(eager.losses, rel=1e-5)
