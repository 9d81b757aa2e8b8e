"""Losses that trainers or their users compute from ``outputs.logits``, outside of the graph: eager's losses and
gradients, and never [batch, seq, vocab].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import fastft  # noqa: E402
from fastft.compare import relative_error  # noqa: E402
from fastft.kernels import _linear_cross_entropy_chunks as chunks  # noqa: E402
from tests.models.test_logits import largest_allocation  # noqa: E402
from tests.trainers import _tiny as tiny  # noqa: E402
from tests.trainers.conftest import Calls  # noqa: E402

#: Logits of a batch [4, 60, WIDE], in half precision, are larger than every weight.
WIDE = 4096
LOGITS_BYTES = 4 * 60 * WIDE * 2


def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, tiny.VOCAB, (60,), generator=generator).tolist() for _ in range(8)]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (5 * i) + row[5 * i :] for i, row in enumerate(ids)]}
    )


def focal(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Log-probabilities as TRL's ``selective_log_softmax`` picks them, and an entropy bonus."""
    z, y = outputs.logits[:, :-1], labels[:, 1:]
    mask = y != -100
    picked = z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)
    log_p = F.log_softmax(z, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = -((1 - picked.exp()) * picked) - 0.01 * entropy
    return (loss * mask).sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


def plain(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, WIDE), labels[:, 1:].reshape(-1), reduction="sum")
    return loss / (labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


SMOOTH: dict[str, Any] = {"label_smoothing_factor": 0.1}
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., torch.Tensor] | None]] = {
    "Trainer, label smoothing": ("Trainer", SMOOTH, None),
    "Trainer, cross entropy": ("Trainer", {}, plain),
    "Trainer, focal": ("Trainer", {}, focal),
    "SFT, label smoothing": ("SFT", SMOOTH, None),
    "SFT, focal": ("SFT", {}, focal),
}


def train(folder: Path, case: str, *, compiled: bool, autocast: bool) -> tuple[tiny.Run, int]:
    """What a run did, and the largest allocation of its second training step in bytes."""
    kind, options, loss = CASES[case]
    run, largest = tiny.Run(), 0
    stock: Any = Trainer if kind == "Trainer" else trl.SFTTrainer

    class Watched(stock):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal largest
            if not self.state.global_step:
                return super().training_step(*args, **kwargs)
            found: list[Any] = []
            largest = largest_allocation(lambda: found.append(super(Watched, self).training_step(*args, **kwargs)))
            return found[0]

    model = tiny.llama(vocab_size=WIDE, layers=1)
    if compiled:
        model.compile(backend="fastft")
    more = {"bf16": autocast, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **options}
    arguments = TrainingArguments if kind == "Trainer" else trl.SFTConfig
    trainer = Watched(
        model=model,
        args=arguments(**tiny.arguments(folder, **more)),
        train_dataset=data(),
        callbacks=[tiny.Watch(run)],
        compute_loss_func=loss,
        **({"processing_class": tiny.tokenizer()} if kind == "SFT" else {}),
    )
    trainer.train()
    return run, largest


@pytest.mark.parametrize("case, autocast", [*((case, False) for case in CASES), ("Trainer, label smoothing", True)])
def test_as_stock(calls: Calls, tmp_path: Path, case: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * WIDE * 4)
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 0.0)
    run, largest = train(tmp_path, case, compiled=True, autocast=autocast)
    report = fastft.report()
    assert report.breaks == 0 and not report.errors, str(report)
    assert report.counts["lazy_logits"] >= 1, str(report)
    assert largest < LOGITS_BYTES
    stock, stock_largest = train(tmp_path, case, compiled=False, autocast=autocast)
    assert stock_largest > LOGITS_BYTES  # the assertion above can fail
    assert run.gradients.keys() == stock.gradients.keys() and run.gradients
    errors = {n: relative_error(g, stock.gradients[n]) for n, g in run.gradients.items()}
    assert max(errors.values()) <= (3e-2 if autocast else 1e-4), str(errors)
    assert run.losses == pytest.approx(stock.losses, rel=1e-3 if autocast else 1e-5)
    assert len(run.losses) == tiny.STEPS


def test_metrics_in_evaluation(calls: Calls, tmp_path: Path) -> None:
    """``compute_metrics`` and ``preprocess_logits_for_metrics`` see what stock's see."""
    results = []
    for compiled in (True, False):
        model = tiny.llama()
        if compiled:
            model.compile(backend="fastft")
        seen: list[Any] = []
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**tiny.arguments(tmp_path, bf16=False, **SMOOTH)),
            eval_dataset=data(),
            compute_metrics=lambda p, seen=seen: seen.append(p.predictions) or {"n": float(p.predictions.size)},
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        results.append((trainer.evaluate(), seen))
    (ours, tokens), (stock, stock_tokens) = results
    assert ours["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5) and ours["eval_n"] == stock["eval_n"]
    assert all((a == b).all() for a, b in zip(tokens, stock_tokens, strict=True)) and tokens
