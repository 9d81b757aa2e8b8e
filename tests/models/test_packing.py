"""Packed batches as transformers' own collator makes them: one graph for every packing, whatever its documents."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import transformers

import fastft

from ._families import VOCAB, build
from ._training import check_equal, compiled, step

PACKINGS, LENGTH = 32, 60


def packings(flash_kwargs: bool) -> list[dict[str, Any]]:
    """Batches of equal length, of 1 to 12 documents."""
    draw = random.Random(0)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs)
    found = []
    for i in range(PACKINGS):
        cuts = sorted({0, LENGTH, *(draw.randrange(1, LENGTH) for _ in range(i % 12))})
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
        found.append(collate([{"input_ids": [draw.randrange(1, VOCAB) for _ in range(n)]} for n in lengths]))
    return found


@pytest.mark.parametrize("flash_kwargs", [False, True], ids=["position_ids", "cu_seq_lens"])
def test_one_graph_for_all_packings(flash_kwargs: bool) -> None:
    model = build("llama3")
    call, batches = compiled(model), packings(flash_kwargs)
    assert len({tuple(b["position_ids"].flatten().tolist()) for b in batches}) == PACKINGS - 2  # three have no cut
    ours = [step(model, dict(data), 0, call) for data in batches]
    report = fastft.report()
    assert (report.graphs, report.recompiles, report.breaks) == (1, 0, 0), str(report)
    found = [s.notes for s in report.sites if s.pattern == "attention"]
    assert len(found) == 2 and all(note.startswith("causal & packed[") for note in found)
    for i in (0, 5, 11, 31):
        alone = {name: batches[i][name] for name in ("input_ids", "labels", "position_ids")}
        check_equal(ours[i], step(model, alone))
    torch._dynamo.reset()
