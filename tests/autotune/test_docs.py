"""docs/variants.md: every step runs as it stands there; and what it says of entry points and ``--import``."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastft import cli
from fastft.autotune.cases import SMALL

DOC = (Path(__file__).resolve().parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")


FILES = dict(re.findall(r"```python title=(\S+)\n(.*?)```", DOC, re.S))
SNIPPETS = re.findall(r"```python\n(.*?)```", DOC, re.S)
ENTRY_POINT = re.findall(r"```toml\n(.*?)```", DOC, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOC, re.S) for line in block.splitlines()]
#: The console script.
FASTFT = "from fastft.cli import main\n\nmain()\n"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python, or the command ``fastft``, in a folder that Python does not look into by itself."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fastft").write_text(FASTFT, encoding="utf-8")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FASTFT_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "300", **more}
        words = (str(tmp_path / "bin" / "fastft"), *words[1:]) if words[0] == "fastft" else words
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_all_steps_are_known() -> None:
    assert [*FILES] == ["my_kernels.py", "use.py"] and len(SNIPPETS) == len(ENTRY_POINT) == 1
    assert {tuple(line.split()[:2]) for line in COMMANDS} == {("fastft", "verify"), ("fastft", "tune")}


def test_the_example_is_verified_and_used(run: Any) -> None:
    (command,) = (line for line in COMMANDS if line.startswith("fastft verify"))
    found = run(*shlex.split(command))
    assert found.returncode == 0 and "It passed" in found.stdout, found.stdout + found.stderr
    used = run("use.py")
    assert used.returncode == 0, used.stderr[-2000:]
    # The verdict is kept, and tune would offer it.
    offered = (
        "import my_kernels; from fastft.autotune.tuning import offered; print([v.name for v in offered('glu', '')])"
    )
    listed = run("-c", f"{SNIPPETS[0]}\n{offered}")
    assert listed.returncode == 0 and "'mine'" in listed.stdout, listed.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would tune")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("fastft tune")])
def test_tune_as_it_is_written(run: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "config.json").write_text(json.dumps(SMALL[0][0]), encoding="utf-8")
    found = run(*shlex.split(command, comments=True))
    if "--model" in command:
        assert found.returncode == 2 and "tuning needs a CUDA GPU" in found.stderr, found.stderr
    else:
        assert found.returncode == 0, found.stderr


# --------------------------------------------------------------------------------------------------------- entry points


def install(folder: Path, name: str, entry: str, **modules: str) -> str:
    """A package in a folder of its own, as pip leaves it there; what PYTHONPATH needs."""
    site = folder / f"site-{name}"
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[fastft_variants]\n{entry}\n", encoding="utf-8")
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text, encoding="utf-8")
    return str(site)


#: Verified on a machine that takes itself for an H100, tuned there (one record, as tune writes it), and trained.
CHOSEN = """
import torch, fastft
from typer.testing import CliRunner
from fastft import cli
from fastft.autotune import database, tuning, variants
from fastft.kernels._op import OPS

database.device_kind = lambda device=None: "h100"
assert "mine" in {v.name for v in fastft.variants.list("glu")}, "registered"
assert "mine" not in {v.name for v in tuning.offered("glu", "h100")}, "not verified yet"
found = CliRunner().invoke(cli.app, ["verify", "--variant", "glu=mine"])
assert found.exit_code == 0, found.output
assert "mine" in {v.name for v in tuning.offered("glu", "h100")}, "offered"
gate, up = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
_, key = variants.site_key(OPS["glu"], (gate, up, "silu"), {})
source = fastft.variants.get("glu", "mine").source[:12]
record = dict(config={}, variant="mine", source=source, us=1.0, heuristic_us=2.0, noise=0.01, tried=2, failures={})
database.user_store().put(key, record)
database.forget()
step = torch.compile(lambda a, b: torch.nn.functional.silu(a) * b, backend="fastft", options={"residual": "eager"})
step(gate, up).sum().backward()
(site,) = fastft.report().sites
assert (site.status, site.notes) == ("replaced", "variant mine"), site
assert not fastft.report().errors, fastft.report().errors
"""


@pytest.mark.parametrize("entry", [*(text.splitlines()[1] for text in ENTRY_POINT), 'mine = "my_kernels"'])
def test_an_entry_point_from_its_package_to_the_report(run: Any, tmp_path: Path, entry: str) -> None:
    site = install(tmp_path, "mine", entry.replace('"', ""), my_kernels=FILES["my_kernels.py"])
    (tmp_path / "my_kernels.py").unlink()
    (tmp_path / "chosen.py").write_text(CHOSEN, encoding="utf-8")
    found = run("chosen.py", PYTHONPATH=site)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]


REPORT = """
import torch, fastft
step = torch.compile(lambda a, b: torch.nn.functional.silu(a) * b, backend="fastft", options={"residual": "eager"})
for n in (4, 5):
    step(*(torch.randn(n, 32, requires_grad=True) for _ in range(2))).sum().backward()
fastft.variants.list("glu")
for one in range(2):
    print(*fastft.report().errors, sep="\\n")
"""


@pytest.mark.parametrize(
    ("entry", "text", "says"),
    [
        ("broken:register_all", "raise RuntimeError('no such GPU\\nand more')", "RuntimeError: no such GPU"),
        ("broken:register_all", "", "AttributeError: module 'broken' has no attribute 'register_all'"),
        ("broken:x", "x = 3", "TypeError: it is int, neither a function nor a module"),
        ("nowhere", "", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_an_entry_point_that_raises(run: Any, tmp_path: Path, entry: str, text: str, says: str) -> None:
    site = install(tmp_path, "broken", f"broken = {entry}", broken=text)
    (tmp_path / "report.py").write_text(REPORT, encoding="utf-8")
    found = run("report.py", PYTHONPATH=site)
    line = f"variants of the entry point broken ({entry}): {says}"
    assert found.returncode == 0 and found.stdout.splitlines() == [line] * 2, found.stdout + found.stderr
    assert "Traceback" not in found.stderr and found.stderr.count(says) <= 1, found.stderr
    asked = run("fastft", "verify", "--variant", "glu=theirs", PYTHONPATH=site)
    assert asked.returncode == 2 and line in asked.stderr and "Traceback" not in asked.stderr


# ------------------------------------------------------------------------------------------------------------- --import

LATER = "import fastft\ndef later():\n    fastft.variants.register('glu', 'mine')(mine)\n"
LATER += "def mine(gate, up, kind):\n    return gate\n"


@pytest.mark.parametrize("what", ["my_kernels", "./my_kernels.py", "later:later", "later.py:later", "package.inner"])
def test_what_can_be_imported(run: Any, tmp_path: Path, what: str) -> None:
    (tmp_path / "later.py").write_text(LATER, encoding="utf-8")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text(FILES["my_kernels.py"], encoding="utf-8")
    code = f"from fastft.autotune import variants; variants.bring({what!r}); print(variants.get('glu', 'mine').call)"
    found = run("-c", code)
    assert "<function mine" in found.stdout, found.stderr


@pytest.mark.parametrize("command", [("verify", "--variant", "glu=mine"), ("tune", "--list")])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nowhere", "it cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("nowhere.py", "there is no file "),
        ("broken.py", "it cannot be imported: ZeroDivisionError: division by zero (line 2 of "),
        ("empty.py", "it registers no variant: put @fastft.variants.register(op, name) above a function of it"),
        ("later.py", "it registers no variant: "),
        ("random.py", "Python has another module 'random', "),
        ("two words.py", "'two words' cannot be the name of a module"),
        ("twice.py", "it cannot be imported: ValueError: fastft has no op 'gluu' (did you mean 'glu'?)"),
    ],
)
def test_what_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...], what: str, says: str
) -> None:
    texts = {"broken": "x = 1\n1 / 0\n", "empty": "", "later": LATER, "random": "", "two words": ""}
    texts["twice"] = "import fastft\nfastft.variants.register('gluu', 'mine')\n"
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in texts.keys() - {"random"}:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = CliRunner().invoke(cli.app, [command[0], "--import", what, *command[1:]])
    for name in texts.keys() - {"random"}:
        sys.modules.pop(name, None)
    assert found.exit_code == 2 and f"--import {what}: {says}" in found.output, found.output
    assert "Traceback" not in found.output


def test_an_unknown_variant_names_the_option() -> None:
    found = CliRunner().invoke(cli.app, ["verify", "--variant", "glu=mine_of_a_file"])
    assert found.exit_code == 2 and "glu has no variant 'mine_of_a_file'" in found.output
    assert "one of your own is known by --import MODULE_OR_FILE" in found.output


def test_the_order_is_the_functions() -> None:
    from fastft.autotune.database import select

    words = r"(?:explicit|tuned|shipped|heuristic)"
    order = re.findall(rf"^\s*\d\. \W*({words})", select.__doc__ or "", re.M)
    assert order == re.findall(rf"^\d\. \*\*({words})", DOC, re.M) == ["explicit", "tuned", "shipped", "heuristic"]
