"""Every trainer of TRL's whose loss goes through its fused head (SFT, DPO, KTO, GRPO, RLOO): beside stock, the same
losses and the first step's gradients; no graph break, the head in the same graph, and never [batch, seq, vocab].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402

import fastft  # noqa: E402
from fastft.compare import relative_error  # noqa: E402
from fastft.kernels import _linear_cross_entropy_chunks as chunks  # noqa: E402
from tests.models.test_logits import largest_allocation  # noqa: E402
from tests.trainers import _tiny as tiny  # noqa: E402
from tests.trainers.conftest import Calls  # noqa: E402

#: Much wider than the model, so that logits are larger than every weight.
WIDE = 4096
#: B is random too: else the gradients of A are zero, and the policy is its reference.
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=tiny.TARGETS, init_lora_weights=False)


def llama() -> Any:
    """One layer; and logits of standard deviation 3, so that tokens differ in probability and entropy."""
    model = tiny.llama(vocab_size=WIDE, layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def words(start: int, count: int) -> str:
    return " ".join(f"w{3 + (7 * start + 5 * i) % 120}" for i in range(count))


def preferences() -> Dataset:
    rows = [{"prompt": words(i, 20), "chosen": words(i + 1, 30 + i), "rejected": words(i + 2, 33)} for i in range(8)]
    return Dataset.from_list(rows)


def judged() -> Dataset:
    return Dataset.from_list(
        [{"prompt": words(i, 20), "completion": words(i + 1, 30 + i), "label": i % 2 == 0} for i in range(8)]
    )


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": words(i, 20)} for i in range(8)])


def completed() -> Dataset:
    return Dataset.from_list([{"prompt": words(i, 20), "completion": words(i + 1, 30 + i)} for i in range(8)])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split())) + 3 * i) for i, text in enumerate(completions)]


ONLINE = {"num_generations": 2, "max_completion_length": 28, "temperature": 0.9}
#: For each case: its trainer, the arguments of its config, its dataset.
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Dataset]]] = {
    "sft nll": ("SFT", {"loss_type": "nll"}, completed),
    "sft dft": ("SFT", {"loss_type": "dft"}, completed),
    "dpo": ("DPO", {}, preferences),
    "dpo, weighted": ("DPO", {"use_weighting": True}, preferences),
    "kto": ("KTO", {}, judged),
    "grpo": ("GRPO", ONLINE, prompts),
    "grpo, KL and entropy": ("GRPO", {**ONLINE, "beta": 0.1, "top_entropy_quantile": 0.5}, prompts),
    "grpo, fp32 head": ("GRPO", {**ONLINE, "cast_lm_head_to_fp32": True}, prompts),
    "rloo": ("RLOO", ONLINE, prompts),
}
#: In half precision, of the smallest batch of any case: four sequences of 48 tokens.
LOGITS_BYTES = 4 * 48 * WIDE * 2


def train(folder: Path, case: str, *, compiled: bool, adapter: bool, bf16: bool = False) -> tuple[tiny.Run, int]:
    """What a run did, and the largest allocation of its second training step in bytes. ``bf16``: autocast."""
    kind, options, dataset = CASES[case]
    run, largest = tiny.Run(), 0
    stock: Any = getattr(trl, f"{kind}Trainer")

    class Trainer(stock):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal largest
            if not self.state.global_step:
                return super().training_step(*args, **kwargs)
            found: list[Any] = []
            largest = largest_allocation(lambda: found.append(super(Trainer, self).training_step(*args, **kwargs)))
            return found[0]

    model, reference = llama(), llama()
    if compiled:
        model.compile(backend="fastft")
        reference.compile(backend="fastft")
    # The second step's loss must show what the first one's gradients did.
    more = {"bf16": bf16, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **options}
    trainer = Trainer(
        model=model,
        args=getattr(trl, f"{kind}Config")(**tiny.arguments(folder, **more)),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
        callbacks=[tiny.Watch(run)],
        **({"peft_config": LORA} if adapter else {"ref_model": reference} if kind == "DPO" else {}),
        **({"reward_funcs": reward} if dataset is prompts else {}),
    )
    trainer.train()
    return run, largest


def test_distillation_keeps_trls_own_divergence(calls: Calls, tmp_path: Path) -> None:
    """TRL's ``DistillationTrainer`` has another head: it compares two models in tiles of its own, outside of its fused
    head. That stays as it is, between compiled graphs of student and teacher, and trains as stock does.
    """

    def train(folder: Path, compiled: bool) -> tiny.Run:
        run, student, teacher = tiny.Run(), llama(), llama()
        with torch.no_grad():
            teacher.lm_head.weight.mul_(0.5)
        for model in (student, teacher) if compiled else ():
            model.compile(backend="fastft")
        more = {"bf16": False, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_completion_length": 12}
        trl.DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=trl.DistillationConfig(**tiny.arguments(folder, **more)),
            train_dataset=prompts(),
            processing_class=tiny.tokenizer(),
            callbacks=[tiny.Watch(run)],
            peft_config=LORA,
        ).train()
        return run

    run = train(tmp_path / "compiled", True)
    report = fastft.report()
    assert calls.count and report.counts["attention"] and report.counts["lora"] and not report.errors, str(report)
    assert "linear_cross_entropy" not in report.counts
    stock = train(tmp_path / "stock", False)
    assert run.gradients.keys() == stock.gradients.keys() and run.gradients
    assert max(relative_error(g, stock.gradients[n]) for n, g in run.gradients.items()) <= 1e-4
    assert run.losses == pytest.approx(stock.losses, rel=1e-5) and len(run.losses) == tiny.STEPS


@pytest.mark.parametrize("case, adapter", [*((case, True) for case in CASES), ("dpo", False), ("sft dft", False)])
def test_as_stock(calls: Calls, tmp_path: Path, case: str, adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * WIDE * 4)
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 0.0)
    run, largest = train(tmp_path, case, compiled=True, adapter=adapter)
    report = fastft.report()
    assert report.breaks == 0 and not report.missed and not report.errors, str(report)
    # A graph with a head in it is one of scoring or training; the others generate.
    heads = [part for part in report.parts if part.counts.get("linear_cross_entropy")]
    assert heads and all(h.counts["linear_cross_entropy"] == h.counts["ignored_tokens"] == 1 for h in heads)
    assert len(heads) == report.graphs or CASES[case][2] is prompts, str(report)
    assert largest < LOGITS_BYTES
    stock, stock_largest = train(tmp_path, case, compiled=False, adapter=adapter)
    assert stock_largest > LOGITS_BYTES  # the assertion above can fail
    assert run.gradients.keys() == stock.gradients.keys() and run.gradients
    errors = {n: relative_error(g, stock.gradients[n]) for n, g in run.gradients.items()}
    # fp32, where the gradients of tokens, with advantages of both signs, nearly cancel.
    assert max(errors.values()) <= 1e-4, str(errors)
    # RLOO's ratio is exp of a difference of sums near 230, each with a rounding of 1.5e-5.
    assert run.losses == pytest.approx(stock.losses, rel=1e-5, abs=5e-5 if case == "rloo" else 1e-6)
    assert len(run.losses) == tiny.STEPS


@pytest.mark.parametrize("case", ["sft nll", "dpo", "grpo"])
def test_as_exact_as_stock_under_autocast(calls: Calls, tmp_path: Path, case: str) -> None:
    """In bf16: the first step's loss and gradients are as near to stock's in fp32 as stock's in bf16 are."""
    ours, stock, exact = (train(tmp_path / str(i), case, compiled=not i, adapter=True, bf16=i < 2)[0] for i in range(3))
    assert fastft.report().counts["linear_cross_entropy"] and not fastft.report().errors
    assert abs(ours.losses[0] - exact.losses[0]) <= 2 * abs(stock.losses[0] - exact.losses[0]) + 2**-9
    for name, expected in exact.gradients.items():
        error, theirs = (relative_error(run.gradients[name], expected) for run in (ours, stock))
        assert error <= 2 * theirs + 2**-9, f"{name}: {error:.2e}, stock's is {theirs:.2e}"
