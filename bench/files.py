"""Result files: what is in every one, and reading those of ``bench kernels`` and ``bench train``.

A file of kernels says ``"kind": "kernels"``; one of training steps is what ``bench/train.py`` writes, whether one run
or a comparison. pytest-benchmark's own file of ``bench/kernels.py`` is read too.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.running import SCHEMA as RUN_SCHEMA
from bench.running import device_info, measured_commit, package_versions
from bench.train import compared

SCHEMA = 1
#: Differences smaller than this share are none, however quiet the machine was; the tuner's too.
LEAST = 0.01
#: The part of a training step's setting that there was no choice of when the first files were written.
DEFAULTS = {"data": "full", "document": 512, "trainer": "loop", "lengths": "fixed", "optimizer": "adamw"}


class NotAResult(ValueError):
    """A file that is no result, or one of a schema that is not known here; the message names the file."""


@dataclass(frozen=True)
class Result:
    """One file. ``kind``: ``kernels`` or ``train``; ``device``: the device's name."""

    path: Path
    kind: str
    data: dict[str, Any]

    @property
    def device(self) -> str:
        return (self.data.get("device") or {}).get("name") or "unknown device"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    @property
    def setup(self) -> dict[str, Any]:
        """A training comparison's setting, as its runs were told; empty where none of them began."""
        runs = (run for row in self.rows for run in row.get("runs", ()))
        return next(({**DEFAULTS, **run["setup"]} for run in runs if "setup" in run), {})

    @property
    def versions(self) -> dict[str, str]:
        runs = (run for row in self.rows for run in row.get("runs", ()))
        return self.data.get("versions") or next((run["versions"] for run in runs if "versions" in run), {})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number of samples."""
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    found = {"median": statistics.median(values), "q1": q1, "q3": q3, "min": min(values), "max": max(values)}
    return {**{k: round(v, 3) for k, v in found.items()}, "samples": len(values)}


def relative_spread(figure: Mapping[str, float]) -> float:
    """The distance between the quartiles over the median."""
    return (figure["q3"] - figure["q1"]) / figure["median"] if figure["median"] else 0.0


def noise_band(*figures: Mapping[str, float], least: float = LEAST) -> float:
    """The share by which medians must differ to be different: the widest of the figures' own spreads and ``least``."""
    return max(least, *map(relative_spread, figures))


def head(kind: str, argv: Sequence[str]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": kind,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": list(argv),
        "commit": measured_commit(),
        "device": device_info(),
        "versions": package_versions(),
    }


def write(data: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)


def load(path: Path) -> Result:
    """Read a result file; raises :class:`NotAResult` with what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotAResult(f"{path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotAResult(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise NotAResult(f"{path} is no result file: its JSON is a {type(data).__name__}, not an object")
    if "benchmarks" in data and "machine_info" in data:
        if "fastft" not in data:
            raise NotAResult(f"{path} is a pytest-benchmark file, but not of bench/kernels.py")
        rows = [b["extra_info"]["row"] for b in data["benchmarks"] if "row" in b.get("extra_info", {})]
        data = {**data["fastft"], "rows": rows}
    if "schema" not in data:
        raise NotAResult(f"{path} is no result file of `fastft bench`: it has no schema")
    kind = data.get("kind")
    if kind is None and "command" not in data:
        if "baseline" in data and isinstance(data.get("rows"), list):
            kind = "train"
        elif "impl" in data and "status" in data:  # one run: a comparison of one
            kind, data = "train", compared({data["impl"]: [data]}, 1, data["impl"], data)
    if kind not in ("kernels", "train") or not isinstance(data.get("rows"), list):
        raise NotAResult(f"{path} is a result file, but of neither `bench kernels` nor `bench train`")
    known = SCHEMA if kind == "kernels" else RUN_SCHEMA
    if data["schema"] != known:
        raise NotAResult(f"{path} has schema {data['schema']!r}; this version reads schema {known}")
    return Result(path, kind, data)
