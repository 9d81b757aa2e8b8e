"""Run pytest with one mistake in one of fastft's files: ``python tests/mutation/_inject.py FILE OLD NEW [ARGUMENTS]``.
Without arguments it serves many of them, from standard input, in forks that have torch imported already: most of the
time of a short run.

Nothing on disk changes: when the file's module is imported, a copy with the mistake is, from a temporary folder, where
Triton and ``inspect`` find its source too. Compiler caches are a folder of its own: their keys hash the sources that
are on disk.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: pytest knows 0 to 5.
NOT_IMPORTED, STALE = 90, 91


def module_name(file: str) -> str:
    """``kernels/glu.py`` is ``fastft.kernels.glu``, ``backend/bridges/trl_head.py`` is ``fastft.bridges.trl_head``."""
    parts = Path(file).with_suffix("").parts
    return ".".join(("fastft", *(parts[1:] if parts[0] == "backend" else parts)))


class Injector:
    """Finds one module, in another place than it is."""

    def __init__(self, name: str, copy: Path) -> None:
        self.name, self.copy, self.found = name, copy, False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.found = True
        return importlib.util.spec_from_file_location(name, self.copy)


def main(file: str, old: str, new: str, *arguments: str) -> int:
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        print(f"{file} has {source.count(old)} times: {old}")
        return STALE
    with tempfile.TemporaryDirectory(prefix="fastft-mutant-") as folder:
        for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[cache] = os.path.join(folder, cache)
        copy = Path(folder, Path(file).name)
        copy.write_text(source.replace(old, new), encoding="utf-8")
        injector = Injector(module_name(file), copy)
        sys.meta_path.insert(0, injector)  # type: ignore[arg-type]
        import pytest

        if autoload := sys.modules.get("fastft.autoload"):
            autoload.autoload()

        code = int(
            pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line", *arguments])
        )
        return code if injector.found else NOT_IMPORTED


#: Dynamo imports all of its backends to look one up.
BACKENDS = ("cudagraphs", "distributed", "inductor", "onnxrt", "tensorrt", "torchxla", "tvm")
#: What tests of many mutants import: most of the time of a short run.
IMPORTED = (
    "hypothesis",
    "pytest",
    "_hypothesis_pytestplugin",
    "anyio.pytest_plugin",
    "pytest_benchmark.plugin",
    "xdist.plugin",
    "pdb",
    "triton.experimental.gluon",
    "torch._dynamo",
    *(f"torch._dynamo.backends.{name}" for name in BACKENDS),
    "torch._dynamo.dce_extra_outputs",
    "torch._higher_order_ops.passes.inline_invoke_subgraph",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.tensor.experimental",
    "torch.export._trace",
    "torch._inductor.compile_fx",
    "torch._functorch.partitioners",
    "networkx",
    "bitsandbytes",
    "transformers.models.llama.modeling_llama",
    "peft",
)
#: Seconds that one mutant's tests may take.
LIMIT_S = 600


def _forked(arguments: list[str], output: int) -> None:
    """The child's whole life: ``main``, with all that is printed in ``output``."""
    os.setsid()  # its process group is the child's and its own children's alone
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(0)
    code = 4  # pytest: an error of usage
    try:
        code = main(*arguments)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """For each line of standard input, a JSON list of ``main``'s arguments, a line ``[exit code, output]``. A run that
    takes too long is killed, and its exit code negative.
    """
    # What bridges wait for is imported before there are any; each fork lays its own, mutants perhaps.
    os.environ["FASTFT_AUTOLOAD"] = "0"
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del os.environ["FASTFT_AUTOLOAD"]
    gc.collect()
    gc.freeze()

    assert threading.active_count() == 1, "a thread of the parent's would be missing in its forks"
    assert not {n for n in sys.modules if n.startswith("fastft.")} - {"fastft.autoload"}, "what a mutant may be of"
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                _forked(json.loads(line), output.fileno())
            timer = threading.Timer(LIMIT_S, os.killpg, (child, signal.SIGKILL))
            timer.start()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            timer.cancel()
            timer.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it started and left
            output.seek(0)
            print(json.dumps([code, output.read().decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    # Python put this file's folder first on the path; the repository's root is not to be there either.
    del sys.path[0]
    os.chdir(ROOT)
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else serve())
