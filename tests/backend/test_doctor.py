"""``fastft doctor``: healthy where the tests run, and on each thing that can be wrong, a row that says what to do."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from fastft import bridges, doctor
from fastft.doctor import BROKEN, OK, WARNING, Check


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Distribution → the version it claims to have, or None for not installed. Filled in by a test."""
    claimed: dict[str, str | None] = {}
    true = importlib.metadata.version

    def version(name: str) -> str:
        if name not in claimed:
            return true(name)
        found = claimed[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return claimed


@pytest.fixture
def rows() -> list[Check]:
    return doctor.diagnose()


def test_this_installation_is_healthy(rows: list[Check]) -> None:
    broken = [row for row in rows if row.status == BROKEN]
    assert not broken
    assert doctor.healthy(rows)
    by_name = {row.name: row for row in rows}
    assert {"torch", "triton", "gpu", "entry point", "autoload", "inductor cache", "bitsandbytes"} <= by_name.keys()
    assert {f"bridge {spec.name}" for spec in bridges.TABLE} <= by_name.keys()
    # Its own small training step went through the backend, with the norm replaced.
    assert "rms_norm ×1 replaced" in by_name["training step"].found


def test_whatever_is_not_ok_says_what_to_do(rows: list[Check]) -> None:
    assert all(row.fix for row in rows if row.status != OK)
    assert not any(row.fix for row in rows if row.status == OK)


def test_json_form() -> None:
    one = Check("torch", BROKEN, "2.0", "upgrade")
    found = doctor.to_dict([Check("python", OK, "3.11"), one])
    assert found["ok"] is False
    assert found["checks"][1] == {"name": "torch", "status": "broken", "found": "2.0", "fix": "upgrade"}
    assert doctor.healthy([Check("gpu", WARNING, "none", "get one")])


def test_a_check_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def _odd_thing() -> Check:
        raise OSError("disk on fire\nand more")

    monkeypatch.setattr(doctor, "CHECKS", (_odd_thing,))
    (row,) = doctor.diagnose()
    assert (row.name, row.status, row.found) == ("odd thing", BROKEN, "OSError: disk on fire")


@pytest.mark.parametrize(
    ("version", "status", "fix"),
    [("2.10.1", BROKEN, "torch>=2.11"), ("2.11.0+cu130", OK, ""), ("2.15.1", OK, ""), ("2.16.0", WARNING, "newer")],
)
def test_torch_outside_the_window(monkeypatch: pytest.MonkeyPatch, version: str, status: str, fix: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    row = doctor._torch()
    assert row.status == status
    assert fix in f"{row.found} {row.fix}"
    assert bool(row.fix) == (status != OK)


def test_triton_that_is_not_the_one_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pin = Requirement("triton==0.1")
    monkeypatch.setattr(doctor, "_requirement", lambda distribution, name: pin)
    row = doctor._triton()
    assert row.status == WARNING
    assert "triton==0.1" in row.fix


@pytest.mark.parametrize(("cuda", "status"), [("13.0", BROKEN), (None, OK)])
def test_triton_missing(monkeypatch: pytest.MonkeyPatch, cuda: str | None, status: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(doctor.sys.modules, "triton", None)
    row = doctor._triton()
    assert row.status == status
    assert ("pip install" in row.fix) == (status == BROKEN)


@pytest.mark.parametrize(
    ("cuda", "smi", "fix"),
    [("13.0", None, "nvidia-smi"), (None, "/bin/nvidia-smi", "CUDA build"), (None, None, "NVIDIA GPU")],
)
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, smi: str | None, fix: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: smi)
    row = doctor._gpu()
    assert row.status == WARNING
    assert fix in row.fix


@pytest.mark.parametrize(("capability", "status"), [((9, 0), OK), ((7, 5), WARNING)])
def test_gpu_by_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str) -> None:
    major, minor = capability
    properties = SimpleNamespace(name="A GPU", major=major, minor=minor, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    row = doctor._gpu()
    assert row.status == status
    assert row.found == f"2 × A GPU, capability {major}.{minor}, 80 GiB"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    row = doctor._compiler()
    assert row.status == BROKEN
    assert "apt install" in row.fix


def test_no_python_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    row = doctor._compiler()
    assert row.status == BROKEN
    assert "python3-dev" in row.fix


def test_libraries_missing_and_too_old(versions: dict[str, str | None]) -> None:
    versions.update(trl=None, transformers="4.57.0")
    rows = {row.name: row for row in doctor._libraries()}
    assert rows["trl"].status == WARNING
    assert "fastft[train]" in rows["trl"].fix
    assert rows["transformers"].status == BROKEN
    assert "transformers>=" in rows["transformers"].fix
    assert rows["peft"].status == OK


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.sys.modules, "trl", None)
    rows = {row.name: row for row in doctor._libraries()}
    assert rows["trl"].status == BROKEN
    assert "cannot be imported" in rows["trl"].found


@pytest.mark.parametrize(("version", "status"), [(None, WARNING), ("0.44.1", BROKEN)])
def test_bitsandbytes_missing_or_too_old(versions: dict[str, str | None], version: str | None, status: str) -> None:
    versions["bitsandbytes"] = version
    row = doctor._bitsandbytes()
    assert row.status == status
    assert "pip install" in row.fix


def test_bitsandbytes_whose_kernels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def quantize_4bit(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(functional, "quantize_4bit", quantize_4bit)
    row = doctor._bitsandbytes()
    assert row.status == BROKEN
    assert "no kernel image" in row.found
    assert "python -m bitsandbytes" in row.fix


def test_a_backend_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    row = doctor._entry_point()
    assert row.status == BROKEN
    assert "pip install" in row.fix


@pytest.mark.parametrize("variable", ["FASTFT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_autoload_switched_off(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "0")
    row = doctor._autoload()
    assert row.status == WARNING
    assert f"unset {variable}" in row.fix


def test_caches_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    rows = {row.name: row for row in doctor._caches()}
    assert rows["triton cache"].status == WARNING
    assert f"{tmp_path / 'ours' / 'triton-cache'} is used" in rows["triton cache"].found
    assert "TRITON_CACHE_DIR" in rows["triton cache"].fix
    assert rows["inductor cache"].status == rows["fastft cache"].status == OK


def test_a_cache_that_others_may_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torch"), ("FASTFT_CACHE_DIR", "ours")):
        monkeypatch.setenv(variable, str(tmp_path / name))
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = {row.name: row for row in doctor._caches()}
    for name in ("inductor cache", "fastft cache"):
        assert rows[name].status == WARNING
        assert "others than its owner may write to it" in rows[name].found
        assert rows[name].fix
    assert f"{tmp_path}/fastft-" in rows["inductor cache"].found  # no other place than a temporary one


def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft import caches

    monkeypatch.setattr(caches, "unusable", lambda folder: "it is on the moon")
    rows = {row.name: row for row in doctor._caches()}
    assert rows["inductor cache"].status == BROKEN
    assert "there is no other folder" in rows["inductor cache"].found


@pytest.mark.parametrize(
    ("found", "status"), [("installed", OK), ("not needed", OK), ("stayed out", WARNING), ("switched off", WARNING)]
)
def test_bridges_by_status(found: str, status: str) -> None:
    row = doctor._bridge(bridges.Bridge("trl_head", found, "why"))
    assert (row.name, row.status, row.found) == ("bridge trl_head", status, f"{found}: why")
    assert bool(row.fix) == (status == WARNING)


def test_a_training_step_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, backend: module)
    row = doctor._training_step()
    assert row.status == BROKEN
    assert "did not call fastft" in row.found
