"""Launch configurations: with nothing tuned they are the heuristics', what is tuned is taken; asking costs little."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
import fastft.kernels
from bench.shapes import SHAPES
from fastft.autotune import database
from fastft.kernels import _config, rms_norm
from fastft.kernels._config import SPACES, Space, listening
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON

fastft.kernels.load()
needs_triton = pytest.mark.skipif(not HAS_TRITON or INTERPRET, reason="launches are noted in place of Triton's")
CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_config, "FAILED", {})
    database.forget()
    yield
    database.forget()


#: Models whose sizes have every op and mask that there is.
MODELS = ("llama-3.1-8b", "gemma-2-9b", "starcoder2-7b")
#: sha256 of an op's launches at these models' shapes (slices apart), bf16 and fp32: norms and rotary as measured on an
#: H100 on 2026-11-25, the others as they were when each kernel's file computed them in its launcher. The loss's has its
#: variant ``fused`` too.
BEFORE = {
    "attention": "4f2d8a81564fffaf3a645dbabd9007d70e7515af81a2b1e570efdb6d5efa5653",
    "glu": "1c4146e040d85c68760b6a7b627864074fbcfae38881d8b7f2072172afe1b3cb",
    "layer_norm": "b06a3cddeb9bcb9705f5f427484bf283d00dc95eea2e1d579f018f7a640f0c51",
    "linear_cross_entropy": "514aa7bae949684c29e8b2d4ba30aca47a20d98a008e2f238e2e85e01065de63",
    "nf4": "14e12fd02398b1311702c9ff686e8c2e5cd79a95cb908a29c083a65ac84717b0",
    "rms_norm": "f71d657c3b2fac68b07ab40d6ccef1835dfa9c36b0a8a3ad69f17c887e449ab5",
    "rotary": "e2eff73affde384bc993f5f3f33669526a034ab45d4271f78c84218f79038a7d",
}


@needs_triton
@pytest.mark.parametrize("op", BEFORE)
def test_with_nothing_tuned_launches_are_what_they_were(op: str) -> None:
    from tests.kernels._launches import launches

    shapes = [s for s in SHAPES if s.op == op and s.model in MODELS and "slices" not in s.tags]
    found = [launches(s, dtype) for s in shapes for dtype in (BF16, torch.float32)]
    assert found
    assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() == BEFORE[op], (
        "tests/kernels/_launches.py shows what is launched; if a heuristic was changed on purpose, put its hash here"
    )


@needs_triton
def test_the_heuristics_are_in_their_spaces_and_legal() -> None:
    from tests.kernels._launches import launches

    with listening() as asked:
        for s in SHAPES:
            if "test" not in s.tags:
                launches(s)
    assert all(asked.values()), "a space that no launch asks"
    for space, keys in asked.items():
        for key in keys:
            assert space.legal(space.chosen(*key), *key) is None, (space.kernel, key)
            found, refused = space.candidates(*key)
            assert space.chosen(*key) in found
            assert len(found) + len(refused) == len(list(itertools.product(*space.values.values())))


def test_every_file_with_kernels_has_spaces() -> None:
    # How lora_linear multiplies is cuBLAS's to choose; its own kernels are nf4's.
    for op in fastft.kernels.load().values():
        file = Path(fastft.kernels.__path__[0], op.call.__module__.rpartition(".")[2] + ".py")
        launched = re.findall(r"kernel\[", file.read_text(encoding="utf-8"))
        assert bool(launched) == any(space.file == file for space in SPACES.values()), file


@needs_triton
def test_an_explicit_configuration_is_launched() -> None:
    from tests.kernels._launches import launches

    (shape,) = [s for s in SHAPES if s.op == "rms_norm" and s.model == "llama-3.1-8b" and s["seq"] == 2048]
    with rms_norm.FORWARD.using({"BLOCK_M": 4, "num_warps": 16}):
        forward, backward, _ = launches(shape)
    assert (forward["BLOCK_M"], forward["BLOCK_N"], forward["num_warps"], forward["grid"]) == (4, 4096, 16, [2048])
    assert backward["BLOCK_M"] == 1
    assert launches(shape)[0]["BLOCK_M"] == 1


def test_undeclared_and_illegal_configurations_are_refused() -> None:
    key = (CPU, BF16, 8192, 4096)
    assert "not one of" in str(rms_norm.FORWARD.legal({"BLOCK_M": 3}, *key))
    assert "no parameter" in str(rms_norm.FORWARD.legal({"num_stages": 3}, *key))
    assert "registers" in str(rms_norm.FORWARD.legal({"BLOCK_M": 64, "num_warps": 1}, *key))


def test_asking_twice_looks_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(database, "select_config", lambda *a: asked.append(a) or ({"BLOCK_M": 2}, "tuned"))
    first = rms_norm.FORWARD(CPU, BF16, 64, 128)
    assert rms_norm.FORWARD(CPU, BF16, 64, 128) == first and first["BLOCK_M"] == 2
    rms_norm.FORWARD(CPU, BF16, 64, 128).pop("BLOCK_M")  # as launchers do with what is theirs
    assert rms_norm.FORWARD(CPU, BF16, 64, 128) == first
    rms_norm.FORWARD(CPU, BF16, 65, 128)
    assert len(asked) == 2
    _config.forget()
    rms_norm.FORWARD(CPU, BF16, 64, 128)
    assert len(asked) == 3


def test_a_lookup_that_fails_is_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(database, "select_config", fails)
    assert rms_norm.FORWARD(CPU, BF16, 64, 128) == rms_norm.FORWARD.heuristic(CPU, BF16, 64, 128)
    assert "no tuned configuration of rms_norm.forward: RuntimeError: no" in fastft.report().errors


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "MOST_KEPT", 3)
    for rows in range(10):
        rms_norm.FORWARD(CPU, BF16, rows, 128)
    assert len(rms_norm.FORWARD._kept) <= 3


#: File of a kernel → the files that decide what it launches: device code, configurations. And files that it computes
#: with beside these, which are in an op's source, not in its launches'.
LAUNCHES = {
    "rms_norm": (["_rows", "rms_norm"], ["_op"]),
    "nf4": (["nf4"], ["_op"]),
    "lora_glu": (["_rows", "glu", "lora_glu"], ["_products", "_dense_weights", "lora_linear", "nf4"]),
    "norm_rotary": (["_rows", "norm_rotary", "rms_norm", "rotary"], ["_op"]),
    "attention": (
        ["_attention_triton", "_maths", "_rows", "attention"],
        ["_attention_mask", "_attention_pytorch", "_attention_routes"],
    ),
    "linear_cross_entropy": (
        [*(f"_linear_cross_entropy_{part}" for part in ("chunks", "fused", "triton")), "_maths", "_rows",
         "linear_cross_entropy"],
        ["_linear_cross_entropy_call", "_products"],
    ),
}  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Path]:
    """A folder with a copy of the kernels' files, which may be edited."""
    for file in Path(_config.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    yield tmp_path
    _config._read.cache_clear()


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_an_edit_of_what_decides_a_launch_is_another_source(kernel: str, copied: Path) -> None:
    """The kernel's own file, its parts, and the device code and configurations that it imports; and nothing else, or
    what was tuned would be void for an edit of what a kernel never loads.
    """
    fastft.kernels.load()
    launches, others = LAUNCHES[kernel]
    (file,) = {space.file for space in SPACES.values() if space.file.stem == kernel}
    assert [path.stem for path in _config.launching(file)] == launches
    mine = copied / file.name

    def sources() -> tuple[str, str]:
        _config._read.cache_clear()
        return _config._sha256(_config.launching(mine)), _config.source_of(mine)

    before = sources()
    assert before == (next(s.source for s in SPACES.values() if s.file == file), _config.source_of(file))
    for path in sorted(copied.glob("*.py")):
        text = path.read_text()
        path.write_text(f"{text}# edited\n")
        launched, whole = (now != then for now, then in zip(sources(), before, strict=True))
        assert launched == (path.stem in launches), path.name
        assert whole or path.stem not in (*launches, *others), path.name
        path.write_text(text)


def test_a_users_file_has_what_it_imports_in_its_source(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mine = tmp_path_factory.mktemp("user") / "mine.py"
    imports = "from fastft.kernels import (\n    glu,\n    rotary as r,\n)\nfrom fastft.kernels._maths import tanh\n"
    mine.write_text(f"import torch\nimport fastft.kernels.nf4 as four\n{imports}")
    assert [path.stem for path in _config.launching(mine)] == ["_maths", "_rows", "glu", "mine", "nf4", "rotary"]
    assert {"_op", "_triton"} < {path.stem for path in _config._reached(mine, lambda _: True)}
    before = _config.source_of(mine)
    mine.write_bytes(b"# -*- coding: latin-1 -*- caf\xe9\n" + mine.read_bytes())
    _config._read.cache_clear()
    assert _config.source_of(mine) != before and "_op" in {p.stem for p in _config._reached(mine, lambda _: True)}


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        Space("rms_norm.forward", {}, lambda *_: {})


@pytest.mark.parametrize("tuned", [False, True])
def test_asking_costs_less_than_two_microseconds(tuned: bool) -> None:
    key = (CPU, BF16, 8192, 4096)
    space = rms_norm.FORWARD
    plain = min(timeit.repeat(lambda: space.heuristic(*key), number=200, repeat=150)) / 200
    space(*key)
    if tuned:
        space._kept[key] = {"BLOCK_M": 2, "num_warps": 8}
    asked = min(timeit.repeat(lambda: space(*key), number=200, repeat=150)) / 200
    print(f"heuristic {1e6 * plain:.2f} µs, asked {1e6 * asked:.2f} µs")
    assert asked - plain < 2e-6
