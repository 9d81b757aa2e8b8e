"""DistributedDataParallel splits the graph at its buckets before a backend sees it: what is whole is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastft

from ._families import batch, build
from ._training import check_equal, compiled, step


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [None, 0.0], ids=["full", "lora"])
def test_split_graphs_are_right(lora: float | None, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch("padding")
    eager = step(build("llama3", lora=lora), data)
    model = build("llama3", lora=lora)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # Buckets of a few layers' parameters, as a real model has them.
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 30_000)
    parallel.bucket_bytes_cap = 40_000
    call = compiled(parallel)
    model.zero_grad(set_to_none=True)
    loss = call(**data).loss
    loss.backward()
    report = fastft.report()
    assert report.graphs > 1, "the graph was not split"
    assert report.counts["rms_norm"] == 5 and report.counts["attention"] == 2, str(report)
    check_equal((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), eager)
