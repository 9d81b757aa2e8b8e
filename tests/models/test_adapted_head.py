"""An adapter on the language model's head, as PEFT makes it: trained exactly, or left alone with a reason; never as if
the head were frozen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

import fastft  # noqa: E402
from fastft.compare import compare  # noqa: E402
from fastft.lazy_logits import LazyLogits  # noqa: E402

from ._families import batch, build  # noqa: E402
from .test_logits import compiled, exactly  # noqa: E402

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
    "dora": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "use_dora": True},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False},
}


def adapted(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(build("llama3"), peft.LoraConfig(r=4, lora_alpha=8, **CONFIGS[kind]))


@pytest.mark.parametrize("labels", [True, False], ids=["loss", "logits"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapted_head(kind: str, labels: bool) -> None:
    data = batch("padding")
    given = data if labels else {k: v for k, v in data.items() if k != "labels"}
    results = []
    for call in (compiled, lambda model: model, lambda model: lambda **kw: exactly(model, **kw)):
        model = adapted(kind)
        out = call(model)(**given)
        (out.loss if labels else out.logits.double().logsumexp(-1).square().mean()).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if not results[1:]:
            # A copy of the head is a head like any other. An adapter's logits are the sum of two products.
            assert isinstance(out.logits, LazyLogits) is (kind == "a copy")
    sites = [s for s in fastft.reports()[-1].sites if s.pattern == "linear_cross_entropy"]
    ours, eager, exact = results
    assert ours.keys() == eager.keys() and any("lm_head" in n for n in ours)
    found = [compare(n, ours[n], g, exact[n]) for n, g in eager.items()]
    assert all(f.ok for f in found), "\n".join(map(str, found))
    assert [(s.status, s.reason.partition(":")[0]) for s in sites] == (
        [] if not labels else [("replaced", "")] if kind == "a copy" else [("missed", "adapter")]
    )
