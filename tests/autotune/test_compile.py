"""Candidates compile for an H100, several at a time. No GPU needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastft.kernels
from fastft.autotune.search import nearest_first
from fastft.autotune.tuning import _noting
from fastft.kernels import attention, glu, rms_norm
from fastft.kernels._config import Config, Space, listening, shown
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON

fastft.kernels.load()
pytestmark = pytest.mark.skipif(
    INTERPRET or not HAS_TRITON or torch.cuda.is_available(), reason="Triton's compiler, in place of a GPU"
)


def run(space: Space) -> None:
    x = torch.randn(4, 512, dtype=torch.bfloat16, requires_grad=True)
    if space is rms_norm.FORWARD:
        rms_norm.rms_norm(x, None, 1e-6)
    elif space is glu.FORWARD:
        glu.glu(x, x, "silu")
    else:
        q = torch.randn(1, 2, 256, 128, dtype=torch.bfloat16)
        attention.attention_kernels(q, q, q, causal=True)


@pytest.mark.parametrize("space", [rms_norm.FORWARD, glu.FORWARD, attention.CONFIGS["forward"]], ids=lambda s: s.kernel)
def test_candidates_compile_in_threads(space: Space) -> None:
    from tests.kernels._hopper import compiling

    noted: list = []
    with compiling(rms_norm, glu, attention):
        with listening() as asked, _noting(noted):
            run(space)
        (key,) = asked[space]
        noted.clear()
        legal, _ = space.candidates(*key)
        chosen: list[Config] = [*nearest_first(space, key, legal)[:2], nearest_first(space, key, legal)[-1]]
        for config in chosen:
            with space.using(config), _noting(noted):
                run(space)
        assert len(noted) == len(chosen), "one launch each"
        with ThreadPoolExecutor(3) as pool:
            kernels = [one.result() for one in [pool.submit(compiles) for compiles in noted]]
    for config, kernel in zip(chosen, kernels, strict=True):
        assert "cubin" in kernel.asm, shown(config)
        assert kernel.metadata.num_warps == config["num_warps"], shown(config)
