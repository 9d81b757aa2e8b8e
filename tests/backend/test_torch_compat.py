"""Everything that torch does not promise stands in one file, and all of it is there in the installed torch."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastft
import fastft.autotune
import fastft.kernels
import fastft.patterns
from fastft import _torch_compat as compat
from fastft.kernels import load

FILES = sorted(
    file
    for package in (fastft, fastft.kernels, fastft.patterns, fastft.autotune)
    for root in package.__path__
    for file in Path(root).rglob("*.py")
)


def private_imports(source: str) -> list[str]:
    """``torch._*`` modules that a source imports, at any depth. ``torch._C._nn.linear`` is a graph target."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [n for n in names if n.split(".")[0] == "torch" and any(part.startswith("_") for part in n.split("."))]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_private_torch_is_imported_in_one_file_only(file: Path) -> None:
    found = private_imports(file.read_text(encoding="utf-8"))
    assert bool(found) == (file.name == "_torch_compat.py"), found


def test_the_scan_finds_what_it_should() -> None:
    assert private_imports("import torch._dynamo as d") == ["torch._dynamo"]
    assert private_imports("def f():\n    from torch._inductor import config") == [
        "torch._inductor", "torch._inductor.config",
    ]  # fmt: skip
    assert private_imports("from torch import _guards") == ["torch._guards"]
    assert private_imports("from torch.fx import Node\nimport torch\nx = torch._C._nn.linear\nfrom . import _op") == []


@pytest.mark.parametrize("name", compat.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(compat, name) is not None


def test_every_public_name_is_listed() -> None:
    source = ast.parse(Path(compat.__file__).read_text(encoding="utf-8"))
    defined = {n.name for n in source.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    assert defined <= set(compat.__all__)
    assert compat.__all__ == sorted(compat.__all__, key=lambda n: (n != n.upper(), n))


def test_late_imports_work_too() -> None:
    # Functions that import inside their bodies would otherwise fail only when they are first called.
    source = ast.parse(Path(compat.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(source):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), compat.__file__, "exec"), {})


def test_version() -> None:
    assert torch.__version__.startswith(".".join(map(str, compat.version())))


def test_checkpoint_op_and_autocast_nodes() -> None:
    assert compat.is_checkpoint(torch.ops.higher_order.tag_activation_checkpoint)
    assert not compat.is_checkpoint(torch.mul)
    assert len(compat.autocast_nodes()) == 2


def test_storage_is_shared_by_views() -> None:
    x = torch.randn(4)
    assert compat.storage_of(x) == compat.storage_of(x[1:])
    assert compat.storage_of(x) != compat.storage_of(x.clone())
    assert compat.storage_of(x.to_sparse()) is None


def test_fake_mode_of_a_captured_graph() -> None:
    modes = []

    def keep(gm: torch.fx.GraphModule, inputs: object) -> object:
        modes.append(compat.fake_mode_of(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x * 2, backend=keep)(torch.ones(3))
    assert modes[0] is not None
    assert compat.fake_mode_of(torch.fx.symbolic_trace(lambda x: x * 2)) is None


def test_cache_stamp_is_taken_back() -> None:
    settings = compat.inductor_config
    before = dict(settings.unsafe_marked_cacheable_functions)
    with compat.cache_stamp({"fastft.x": "hash"}):
        assert settings.unsafe_marked_cacheable_functions == before | {"fastft.x": "hash"}
    assert dict(settings.unsafe_marked_cacheable_functions) == before


def test_innermost_backend() -> None:
    def backend(gm: object, inputs: object) -> None: ...

    wrapped = torch._TorchCompileWrapper(functools.partial(backend), None, None, None)
    assert compat.innermost_backend(wrapped) is backend
    assert compat.innermost_backend(backend) is backend
    assert compat.backend_in_trace() is None
    assert compat.registered_backend("no such backend") is None


def test_operands_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 prints, where it meets an operator for the first time, all that its operands are computed from: a
    residual stream of four layers took minutes.
    """
    from torch._inductor import ir

    library = torch.library.Library("fastft_test", "FRAGMENT")
    for name in ("never_seen", "nor_this"):
        library.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, lambda x: x + 1, "CPU")
        torch.library.register_fake(f"fastft_test::{name}", torch.empty_like, lib=library)

    def printed(*_: object, **__: object) -> str:
        raise AssertionError("an operand was printed")

    monkeypatch.setattr(ir.IRNode, "str_helper", printed)
    monkeypatch.setattr(ir.ExternKernel, "__str__", printed)
    x = torch.ones(3)
    ops = torch.ops.fastft_test
    gm = torch.fx.symbolic_trace(lambda x: (ops.nor_this(ops.never_seen(x)),))
    (got,) = compat.compile_with_inductor(gm, [x], {})(x)
    assert torch.equal(got, x + 2)


def test_attentions_inputs_are_looked_at() -> None:
    """cuDNN may be what reads them."""
    load()
    graph, ops = torch.fx.Graph(), torch.ops.fastft
    q, w = graph.placeholder("q"), graph.placeholder("w")
    normed = graph.call_function(ops.rms_norm.default, (w, w, 1e-6, 0.0, None))
    graph.output((normed, graph.call_function(ops.attention.default, (q, q, q))))
    assert compat._not_looked_at(compat.Half(graph, False, (), frozenset())) == [1]


@pytest.mark.parametrize("also_read", [False, True])
def test_which_inputs_inductor_looks_at(also_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that its own kernels read and that are no parameters, of the forward; of the backward what is no kept
    tensor.
    """
    from torch._inductor import compile_fx

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = F.rms_norm(x * self.scale, (8,), weight, 1e-6)
            return (y * weight if also_read else y) * 2

    looked_at, stock = list[list[tuple[int, ...]]](), compile_fx.compile_fx_inner

    def compile_fx_inner(graph: Any, inputs: Any, **settings: Any) -> Any:
        known = settings.get("static_input_idxs", ())
        looked_at.append([tuple(x.shape) for i, x in enumerate(inputs) if i not in known])
        return stock(graph, inputs, **settings)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_fx_inner)
    network, x = Network(), torch.randn(3, 8, requires_grad=True)
    with torch._inductor.config.patch(force_disable_caches=True):  # a graph that is found there is not compiled
        torch.compile(network, backend="fastft")(x, torch.randn(8)).sum().backward()
    assert looked_at[0] == [(3, 8), (8,)][: 1 + also_read]
    assert looked_at[1] == [(3, 8)]  # the gradient


def test_inductor_settings() -> None:
    assert {"max_autotune", "triton.cudagraphs"} <= compat.inductor_settings()
