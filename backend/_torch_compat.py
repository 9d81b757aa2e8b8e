"""The only file that imports what torch does not promise to keep. Supported: torch 2.11 to 2.15; a test imports every
name here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
import torch._dynamo
import torch._inductor.config as inductor_config
from torch._guards import CompileContext
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.utils.checkpoint import CheckpointPolicy

from fastft.collecting import no_collection

__all__ = [
    "MUST_SAVE", "PREFER_RECOMPUTE", "SPIN", "Call", "Half", "Moment", "allow_compilations", "autocast_nodes",
    "backend_in_trace", "cache_stamp", "compile_seconds", "compile_with_aot_eager", "compile_with_inductor",
    "control_flow", "copy_graph", "copy_joint", "current_device", "current_stream", "dynamo_counters", "fake_mode",
    "fake_mode_of", "forget_loaded_code", "grad_mode_at", "gradients", "graph_is_retained", "has_storage", "holders",
    "inductor_cache_dir", "inductor_settings", "innermost_backend", "input_source", "is_checkpoint", "is_recompile",
    "no_side_effect_calls", "numbers_are_inputs", "on_one_gpu", "partition", "plain_tensors", "process_group_store",
    "qualified_name", "registered_backend", "size_expression", "size_hint", "spin", "static_inputs", "storage_of",
    "tree_map", "version", "whole_cache_entries", "wrapper_context",
]  # fmt: skip

PREFER_RECOMPUTE = CheckpointPolicy.PREFER_RECOMPUTE
MUST_SAVE = CheckpointPolicy.MUST_SAVE
#: Within, classes of tensors are not asked in Python for what is done with them.
plain_tensors = torch._C.DisableTorchFunctionSubclass
#: Number of the current GPU; and, of a GPU's number, the handle of its current stream. Without what torch.cuda makes
#: around them, which takes longer. (torch without CUDA has neither; what stands for them raises.)
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", torch.cuda.current_stream)
#: Whether the backward that runs was asked to keep its graph for another one (``retain_graph``).
graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph
#: Whether a tensor lies in memory: a gradient under ``is_grads_batched`` stands for several.
has_storage = torch._C._has_storage
#: Cuts a joint graph into forward and backward: ``(graph, number of the forward's outputs, positions of inputs that
#: live as long as the model) -> (forward, backward)``.
Partitioner = Callable[
    [torch.fx.GraphModule, int, "list[int] | None"], tuple[torch.fx.GraphModule, torch.fx.GraphModule]
]
#: A compiled half, of the list of its inputs.
Call = Callable[[Any], Any]


class Half(NamedTuple):
    """The forward or the backward of a graph, before Inductor compiles it. ``fixed``: positions of inputs that stay
    where they are from step to step (parameters, what the forward kept for the backward); ``visible``: of outputs that
    a user may keep.
    """

    graph: torch.fx.Graph
    backward: bool
    fixed: tuple[int, ...]
    visible: frozenset[int]

    @classmethod
    def of(cls, graph: torch.fx.Graph, settings: Mapping[str, Any], static: frozenset[str]) -> Half:
        """Of a graph that Inductor is given with its ``settings``. ``static``: the forward's inputs that are fixed
        beside those of the settings, by name.
        """
        backward = bool(settings.get("is_backward"))
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        visible = () if backward else output.meta.get("user_visible_output_idxs", ())
        names = [n.name for n in graph.nodes if n.op == "placeholder"]
        also = () if backward else [i for i, name in enumerate(names) if name in static]
        return cls(graph, backward, tuple(sorted({*settings.get("static_input_idxs", ()), *also})), frozenset(visible))


def static_inputs(graph: torch.fx.Graph) -> frozenset[str]:
    """Parameters and buffers among a Dynamo graph's inputs, by the names that AOTAutograd gives them. (What it knows of
    them itself is lost with a copy of the graph.)
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    static = "_dynamo_static_input_type"
    return frozenset(f"primals_{i + 1}" for i, n in enumerate(inputs) if static in n.meta.get("tensor_dict", {}))


def version() -> tuple[int, int]:
    """torch's (major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def is_checkpoint(target: Any) -> bool:
    """Whether a graph node's target is the higher-order op that gradient checkpointing traces to."""
    return target is tag_activation_checkpoint


def autocast_nodes() -> tuple[Any, Any]:
    """The graph targets that enter and leave an autocast region."""
    return torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def no_side_effect_calls() -> tuple[Any, ...]:
    """Calls that Dynamo leaves in graphs and that do nothing to tensors."""
    return (torch._C._log_api_usage_once,)


def grad_mode_at(node: torch.fx.Node) -> bool:
    """Whether gradients are recorded where ``node`` stands: what the last change before it says (``no_grad`` as Dynamo
    traces it), or the mode that the graph is compiled in.
    """
    while (node := node.prev).op != "root":
        if node.target is torch._C._set_grad_enabled:
            return bool(node.args[0])
    return torch.is_grad_enabled()


def fake_mode() -> FakeTensorMode:
    """A new one: within, calls give shapes and strides, and compute nothing."""
    return FakeTensorMode()


def fake_mode_of(gm: torch.fx.GraphModule) -> Any:
    """The FakeTensorMode of the tensors in a Dynamo graph's metadata (Dynamo hands backends a fresh one for the
    inputs), or None.
    """
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("example_value"), FakeTensor):
            return node.meta["example_value"].fake_mode
    return None


def compile_with_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    patches: Mapping[str, Any],
    backward_attempt: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    partitioner: Partitioner | None = None,
    uuid: str = "",
    in_order: Callable[[torch.fx.Graph], bool] = lambda graph: False,
    around: Callable[[Half], Callable[[Call], Call]] = lambda half: lambda call: call,
    in_each_process: bool = False,
) -> Callable[..., Any]:
    """Inductor's ``compile_fx`` with config patches that hold for the lazily compiled backward too.

    The backward is compiled when it first runs, inside of ``backward_attempt()``; if that context keeps what is raised,
    this backward runs op by op. ``partitioner`` cuts the joint graph, in every process anew: AOTAutograd's cache, which
    would hand out what was cut elsewhere, is not asked (Inductor's knows the two graphs by what is in them). ``uuid``
    says which partitioner it is. A graph for which ``in_order`` says so runs in the order it has.
    ``around(half)(call)`` runs in place of each compiled half's ``call(inputs)``, unless Inductor's CUDA graphs do, or
    its inputs are on several GPUs; what AOTAutograd has in its cache comes without it, unless ``in_each_process``.
    """
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        if in_order(graph.graph):
            with inductor_config.patch(reorder_for_peak_memory=False):
                return compile_half(graph, inputs, **settings)
        return compile_half(graph, inputs, **settings)

    def compile_half(graph: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        # Inductor changes the graph it is given.
        alone = not settings.get("cudagraphs") and on_one_gpu(inputs)
        half = Half.of(graph.graph, settings, static)
        wrap = around(half) if alone else None
        if alone:
            settings["static_input_idxs"] = _not_looked_at(half)
        if not settings.get("is_backward"):
            return surrounded(compile_fx_inner(graph, inputs, **settings), wrap)
        plain = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
        with backward_attempt(), whole_cache_entries(), _operators_by_name(), no_collection():
            return surrounded(compile_fx_inner(graph, inputs, **settings), wrap)
        for node in plain.graph.nodes:
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default  # the compiled forward may have saved other strides
        plain.recompile()
        return make_boxed_func(plain.forward)

    def surrounded(half: Any, wrap: Callable[[Call], Call] | None) -> Any:
        call = getattr(half, "current_callable", None)
        if call is not None and wrap is not None:
            half.current_callable = wrap(call)
        return half

    static = static_inputs(gm.graph)
    settings: dict[str, Any] = dict(patches)
    with contextlib.ExitStack() as stack:
        stack.enter_context(whole_cache_entries())
        stack.enter_context(_operators_by_name())
        if partitioner is not None:
            settings["custom_partitioner_fn"] = _Partitioner(partitioner, uuid)
        if partitioner is not None or in_each_process:
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        compiled: Any = compile_fx(gm, list(example_inputs), inner_compile=compile_graph, config_patches=settings)
    return compiled


def _not_looked_at(half: Half) -> list[int]:
    """Positions of inputs whose address Inductor need not look at in each call (an 8B in 4 bits has 1,600, five of each
    weight): those that stay where they are, as torch has it itself where a backend hands on the graph that it got, and
    those that only ops of ours read. Inductor's own kernels want 16 bytes to divide it; ours take any, but for
    attention, which may be cuDNN's.
    """

    def take_any(readers: Iterable[Any]) -> bool:
        names = [str(reader) for reader in readers]
        return all(name.startswith("fastft.") and not name.startswith("fastft.attention") for name in names)

    inputs = [n for n in half.graph.nodes if n.op == "placeholder"]
    readers = [[u.target for u in n.users if u.op != "output"] for n in inputs]
    return sorted({*half.fixed, *(i for i, found in enumerate(readers) if take_any(found))})


def on_one_gpu(inputs: Sequence[Any]) -> bool:
    """Whether no two tensors are on GPUs of different numbers."""
    return len({x.device for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda}) < 2


class _Partitioner(CustomPartitionerFn):
    """A :data:`Partitioner` as Inductor takes it."""

    def __init__(self, partitioner: Partitioner, uuid: str) -> None:
        self.partitioner, self._uuid = partitioner, uuid

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        return self.partitioner(gm, kwargs["num_fwd_outputs"], kwargs.get("static_lifetime_input_indices"))

    def uuid(self) -> str:
        return self._uuid

    # Inductor copies its settings, and pickles them for cache keys.
    def __deepcopy__(self, memo: Any) -> _Partitioner:
        return self

    def __getstate__(self) -> dict[str, str]:
        return {"_uuid": self._uuid}


def partition(
    gm: torch.fx.GraphModule, forward_outputs: int, static: list[int] | None
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """AOTAutograd's minimum cut, by the tags in the graph's metadata. ``gm`` is used up."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    with _use_lazy_graph_module(
        True
    ):  # most of these graphs are never run: a third of the time would go into their code
        return min_cut_rematerialization_partition(
            gm, None, compiler="inductor", num_fwd_outputs=forward_outputs, static_lifetime_input_indices=static
        )


@contextlib.contextmanager
def _operators_by_name() -> Iterator[None]:
    """In here Inductor says which operator it has no lowering for by its name alone.

    torch 2.11 prints the operands too, for a log that nobody may read, each with all that it is computed from; a value
    that is read twice is printed twice, so a residual stream doubles the text at every layer. 2.13 waits for a reader.
    """
    from torch._inductor import exc

    issue: Any = exc.OperatorIssue
    if version() >= (2, 13):
        yield
        return
    stock = issue.operator_str
    issue.operator_str = staticmethod(lambda target, args, kwargs: f"  target: {target}")
    try:
        yield
    finally:
        issue.operator_str = staticmethod(stock)


@contextlib.contextmanager
def whole_cache_entries() -> Iterator[None]:
    """In here Inductor and AOTAutograd find no cache entry that was damaged: it is removed before they look.

    An entry is a pickle whose file is named by its hash, which torch does not check: with one bit flipped most of them
    still load (85 of 100, measured), as other code or other constants.
    """
    from torch._inductor import codecache

    cache: Any = codecache.GuardedCache
    stock = cache.iterate_over_candidates.__func__

    def candidates(cls: Any, local: bool, *others: Any) -> Iterator[Any]:
        folder = cls._get_tmp_dir_for_key(others[-1])
        for name in os.listdir(folder) if local and os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                if not name.startswith("."):  # another process's, not yet whole
                    with open(path, "rb") as file:
                        content = file.read()
                    if codecache.sha256_hash(content) != name:
                        os.remove(path)
        return stock(cls, local, *others)

    cache.iterate_over_candidates = classmethod(candidates)
    try:
        yield
    finally:
        cache.iterate_over_candidates = classmethod(stock)


def control_flow() -> tuple[type[Exception], ...]:
    """What a backend raises, or lets pass, to tell Dynamo what to do next: no failure."""
    return torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame


def compile_with_aot_eager(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], partitioner: Partitioner | None = None
) -> Callable[..., Any]:
    """AOTAutograd without a code generator: what runs checkpoint higher-order ops op by op, with the right random
    state. With a ``partitioner``, the joint graph that it cuts is of the ops that Inductor would see.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import aot_eager, boxed_nop
    from torch._inductor.compile_fx import select_decomp_table

    if partitioner is None:
        return aot_eager(gm, list(example_inputs))
    cut: Any = _Partitioner(partitioner, "")
    with inductor_config.patch(fallback_random=True):  # dropout draws as eager does
        table = select_decomp_table()
    compile_graph: Any = aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=cut, decompositions=table
    )
    return compile_graph(gm, list(example_inputs))


class Moment:
    """Where the compilation of a graph stands, so that the same graph can be compiled once more later: with the same
    symbols for its sizes. ``inputs``: the graph's, as AOTAutograd takes them in this compilation, without memory.

    Guards are in place by then. A compilation that adds one would hold for less than those promise: ``with`` raises
    :class:`RuntimeError` at its end.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        context: Any = torch._guards.TracingContext.try_get()
        mode: Any = None if context is None else context.fake_mode
        self.mode, self.compiling = mode, CompileContext.try_get()
        self.inputs: list[Any] = [
            mode.from_tensor(x, symbolic_context=context.tensor_to_context.get(x))
            if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and context is not None
            else x
            for x in inputs
        ]

    def __enter__(self) -> None:
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(self.mode)))
        self.stack.enter_context(torch._guards.compile_context(self.compiling))
        self.guards = self._guards()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stack.close()
        if kind is None and self._guards() != self.guards:
            raise RuntimeError("it holds for fewer sizes than the graph did")

    def _guards(self) -> tuple[set[Any], dict[Any, Any]]:
        env = None if self.mode is None else self.mode.shape_env
        return ({g.expr for g in env.guards}, dict(env.replacements)) if env is not None else (set(), {})


def copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of a Dynamo graph, with what Dynamo notes on its inputs beside metadata (AOTAutograd asks for it)."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def size_hint(size: int | torch.SymInt) -> int | None:
    """A size as it was when the graph was traced, without a guard; None for one that is known at run time only."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if isinstance(hint, (int, sympy.Integer)) else None


def copy_joint(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of AOTAutograd's joint graph, metadata included."""
    graph = torch.fx.Graph()
    copied: Any = graph.graph_copy(gm.graph, {}, return_output_node=True)
    result, output = copied
    graph.output(result).meta = copy.copy(output.meta)
    return _LazyGraphModule(gm, graph)


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression in the symbols of the graph."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def input_source(node: torch.fx.Node) -> str:
    """Where an input of a Dynamo graph comes from, as Python: ``L['self']._modules['norm']._parameters['weight']``;
    empty when Dynamo does not say.
    """
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)  # a method before torch 2.12


def gradients(
    outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """What ``torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)`` returns, with the caller's torch
    function modes on in the backward too: ``torch.autograd.grad`` is a call that they handle, and they are off while
    they do.
    """
    from torch.autograd.graph import _engine_run_backward

    grads: Any = _engine_run_backward(
        tuple(outputs), tuple(cotangents), False, False, tuple(inputs), True, accumulate_grad=False
    )
    return grads


def storage_of(tensor: torch.Tensor) -> int | None:
    """Identity of a tensor's memory, also a fake tensor's (views share it); None when it has none (sparse)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def holders(storage: Any) -> int:
    """How many hold a tensor's storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))  # type: ignore[attr-defined]


def inductor_settings() -> frozenset[str]:
    """The names that Inductor's config patches can have."""
    return frozenset(inductor_config.get_config_copy())


@contextlib.contextmanager
def cache_stamp(functions: Mapping[str, str]) -> Iterator[None]:
    """Let AOTAutograd's cache hold graphs that call ``functions`` (qualified name → hash of what they do): the hash
    becomes part of the key.
    """
    merged = {**inductor_config.unsafe_marked_cacheable_functions, **functions}
    with inductor_config.patch(unsafe_marked_cacheable_functions=merged):
        yield


def process_group_store() -> tuple[Any, int] | None:
    """The default process group's key-value store, which every rank reaches, and this process's rank; None where there
    is no group, or nobody else in it.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store(), distributed.get_rank()


def dynamo_counters() -> dict[str, dict[str, int]]:
    """Dynamo's own counters (graph breaks by reason, recompilations, cache hits)."""
    return {k: dict(v) for k, v in torch._dynamo.utils.counters.items()}


def compile_seconds() -> dict[str, float]:
    """Seconds that this process spent in each phase of compilation that torch times, all graphs together. Phases lie in
    each other: ``_compile.compile_inner`` has all of Dynamo's part, the backend's and the forward's code in it.
    """
    return {phase: sum(times) for phase, times in torch._dynamo.utils.compilation_time_metrics.items()}


def is_recompile() -> bool:
    """Whether the frame that is being compiled was compiled before (another shape, another grad mode)."""
    compile_id = CompileContext.current_compile_id()
    return compile_id is not None and bool(getattr(compile_id, "frame_compile_id", 0))


def allow_compilations(count: int) -> None:
    """Let Dynamo compile the same code ``count`` times, before it leaves calls that fit none of these uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def numbers_are_inputs() -> bool:
    """Whether Dynamo makes inputs of all Python floats in what is compiled now, because ``dynamic=True`` was asked for.

    False after a few compilations of the same code: one of its numbers changes all the time.
    """
    compile_id = CompileContext.current_compile_id()
    few = compile_id is not None and (getattr(compile_id, "frame_compile_id", 0) or 0) < 4
    return few and not torch._dynamo.config.assume_static_by_default


def qualified_name(function: Callable[..., Any]) -> str:
    """The name by which AOTAutograd's cache knows a function in a graph."""
    return f"{function.__module__}.{function.__name__}"


def backend_in_trace() -> Any:
    """What ``torch.compile(backend=...)`` resolved to, for the frame that Dynamo is tracing now; None outside of a
    trace.

    Called from Python that Dynamo runs while tracing (``assume_constant_result``). Unwraps what torch puts around a
    backend: the minifier's wrapper,
    ``torch.compile``'s own (which holds mode and options), DDP's graph splitter, partials.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # Nothing is being traced in this thread.
        return None
    return innermost_backend(backend)


def innermost_backend(backend: Any) -> Any:
    """A backend without the wrappers that torch puts around it."""
    while True:
        splitter = getattr(backend, "__self__", None)
        inner = (
            getattr(backend, "_torchdynamo_orig_backend", None)
            or getattr(splitter, "backend_compile_fn", None)
            or (backend.func if isinstance(backend, functools.partial) else None)
            or (backend.compiler_fn if isinstance(backend, torch._TorchCompileWrapper) else None)
        )
        if inner is None:
            return backend
        backend = inner


def registered_backend(name: str) -> Any:
    """The function registered with Dynamo as backend ``name``, or None if nobody looked it up yet (this does not load
    it).
    """
    from torch._dynamo.backends.registry import _COMPILER_FNS

    return _COMPILER_FNS.get(name)


def wrapper_context(module: torch.nn.Module) -> Any:
    """The context of a ``torch.compile(module)`` wrapper, which compiles any callable as the wrapper compiles its
    module; None for other modules.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    return module.dynamo_ctx if isinstance(module, OptimizedModule) else None


def inductor_cache_dir() -> str:
    """The folder in which Inductor, and AOTAutograd's cache with it, keeps what it compiled (it may not exist yet)."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()


def forget_loaded_code() -> None:
    """Let Inductor load nothing again that it loaded in this process: what runs keeps running."""
    from torch._inductor.utils import clear_caches

    clear_caches()


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` (nested tuples, lists, dicts) with ``function`` applied to every leaf."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)


#: Part of the name of the kernel that :func:`spin` launches.
SPIN = "spin_kernel"


def spin(cycles: int) -> None:
    """A kernel that the GPU spends so many clock cycles in, on the current stream: a mark that a profile shows."""
    torch.cuda._sleep(cycles)
