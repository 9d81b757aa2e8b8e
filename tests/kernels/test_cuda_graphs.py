"""Training steps that are replayed as CUDA graphs, on a GPU, beside the same steps kernel by kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastft
from fastft.cuda_graphs import Replayed
from tests.backend.test_cuda_graphs import batch, noted_halves
from tests.models import _families as families
from tests.models._training import compiled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")


def train(steps: int, accumulated: int = 1, dropout: float = 0.0, hold: bool = False, **options: Any) -> list[float]:
    """Losses of steps of SGD in bf16."""
    model = families.build("llama3", lora=dropout, checkpointing=True).cuda()
    call = compiled(model, residual="inductor", **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, held = torch.optim.SGD(trained, lr=0.5), [], []
    torch.manual_seed(0)
    for i in range(steps):
        for j in range(accumulated):
            given = {k: v.cuda() for k, v in batch(i * accumulated + j, (2, 64)).items()}
            with torch.autocast("cuda", dtype=torch.bfloat16):
                outputs = call(**given)
            outputs.loss.backward()
            losses.append(outputs.loss.detach())
            held[:] = [outputs] if hold else []
        optimizer.step()
        optimizer.zero_grad()
    return [float(loss) for loss in losses]


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    return noted_halves(monkeypatch)


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"memory": "lean", "host_memory": 0}, {"memory": "fast"}])
def test_as_kernel_by_kernel(halves: list[Replayed], options: dict[str, Any]) -> None:
    wanted = train(8, **options)
    got = train(8, cuda_graphs=True, **options)
    forward, backward = halves
    assert (forward.replayed, forward.missed, backward.replayed, backward.missed) == (7, 0, 7, 0), fastft.report().plan
    assert len(set(wanted)) == 8
    assert got == pytest.approx(wanted, rel=2e-3)
    assert not fastft.report().errors


def test_dropout_draws_anew_in_every_replay(halves: list[Replayed]) -> None:
    """The same numbers as kernel by kernel."""
    wanted = train(8, dropout=0.3, memory="fast")
    got = train(8, dropout=0.3, memory="fast", cuda_graphs=True)
    assert halves[0].replayed == 7
    assert got == pytest.approx(wanted, rel=2e-3)


def test_accumulated_gradients_and_results_that_are_held(halves: list[Replayed]) -> None:
    wanted = train(4, accumulated=3, hold=True, memory="fast")
    got = train(4, accumulated=3, hold=True, memory="fast", cuda_graphs=True)
    assert got == pytest.approx(wanted, rel=2e-3)
    assert all(half.replayed > 4 for half in halves), [(half.replayed, half.missed) for half in halves]
