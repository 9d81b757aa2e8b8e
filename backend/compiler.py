"""What ``torch.compile(model, backend="fastft")`` calls: one function, numbered steps.

A step that raises is undone, and the graph is compiled without it (:mod:`fastft.fallback`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fastft import _torch_compat as compat
from fastft import bridges, caches, describing, reporting
from fastft.autotune import database, variants
from fastft.collecting import no_collection
from fastft.cuda_graphs import ROW, Graphs
from fastft.fallback import Attempt
from fastft.first_step import FirstStep
from fastft.kernels._dense_weights import Rounded
from fastft.kernels._op import OPS, rescue
from fastft.kernels.linear_cross_entropy import linear_log_prob
from fastft.memory import Memory, Planned
from fastft.normalise import normalise
from fastft.offload import has_offloads
from fastft.options import Options
from fastft.outputs import LazyOutputs, drop_lazy, with_lazy
from fastft.partitioner import save_what_leaves
from fastft.patterns.attention import skip_padding
from fastft.reporting import MISSED, REPLACED, Report, Site
from fastft.rewrite import Rewritten, module_path, rewrite
from fastft.stamp import source_hash

log = logging.getLogger("fastft")

# torch imports this module when it looks the backend up: before anything is traced, so what must change tracing, and
# where torch looks for what it knows from earlier runs, is put in place here.
bridges.install()
with Attempt("looking at torch's cache folders", "they are looked at again when a graph is compiled", []):
    caches.secure()


@no_collection()
def fastft(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. ``options`` are those of :class:`fastft.Options`; raises
    :class:`fastft.options.OptionError` for others.
    """
    # 1. Keep the graph as it came.
    asked = Options.of(options, mode)
    rescue(not asked.strict)
    done = Report(graphs=1, recompiles=int(compat.is_recompile()))
    with Attempt("sharing what is tuned", "ranks may launch kernels differently", done.errors, asked.strict):
        database.share()
    untouched = compat.copy_graph(gm.graph)
    plain = fx.GraphModule(gm, compat.copy_graph(gm.graph)) if asked.verify == "first_step" else None
    lazy = transform(gm, asked, done)
    # 6. Compile the rest.
    start = time.perf_counter()
    compiled, lazy = _compile_rest(gm, untouched, lazy, example_inputs, asked, done)
    done.timings["compile"] = time.perf_counter() - start
    reporting.add(done)
    log.info("compiled a graph: %s", done.counts)
    # 7. Wrap the callable.
    call = compiled if lazy is None else with_lazy(compiled, lazy, done.errors, asked.strict)
    if plain is not None:
        with Attempt("verifying", "the graph is not verified", done.errors, asked.strict):
            return FirstStep(call, plain, done, asked)
    return call


def transform(gm: fx.GraphModule, options: Options, done: Report) -> LazyOutputs | None:
    """Steps 2 to 5, in place. Fills ``done``; returns which outputs are lazy now."""
    start = time.perf_counter()
    counts, rewritten, lazy = {"checkpoints": 0, "kept": 0}, Rewritten(), None

    def step(what: str, instead: str) -> Attempt:
        before = compat.copy_graph(gm.graph)
        return Attempt(what, instead, done.errors, options.strict, lambda: setattr(gm, "graph", before))

    # 2. Normalise: one flat graph.
    with step("normalising", "checkpointed layers are left as they are, and no site in them is found"):
        counts = normalise(gm, recompute=options.recompute == "asked", planned=options.memory is not None)
    modules: list[str] = []
    with _describing(done, options):
        done.device, done.inputs = describing.device_of(gm.graph), describing.inputs_of(gm.graph)
        modules = describing.modules_of(gm.graph)
    # 3., 4. Match and rewrite, each rewrite checked.
    with step("rewriting", "nothing is replaced"):
        bridged = _bridged(gm)
        done.sites = list(bridged.values())
        rewritten = rewrite(gm, options, compat.fake_mode_of(gm), bridged)
        done.sites = rewritten.sites
    done.errors += rewritten.errors
    if options.lazy_logits and rewritten.lazy:
        with step("leaving the logits out", "they are computed in every step"):
            lazy = drop_lazy(gm, rewritten.lazy)
    # 5. Plan: what the user put under checkpointing is recomputed layer by layer, cheap ops always.
    with step("planning", "torch decides what is recomputed"):
        done.plan |= _plan(counts, options)
        save_what_leaves(gm.graph)
        if options.skip_padding:
            eager = options.verify != "never"
            done.plan["padding"] = "computed: verify compares with eager" if eager else skip_padding(gm.graph)
        gm.graph.lint()
        done.plan |= _not_taken(gm.graph, options)
    with _describing(done, options):
        done.modules = describing.described(gm.graph, modules, rewritten.into)
    gm.recompile()
    done.timings["rewrite"] = time.perf_counter() - start
    return lazy


def _describing(done: Report, options: Options) -> Attempt:
    return Attempt("describing the graph", "the report lacks what it is of", done.errors, options.strict)


def _bridged(gm: fx.GraphModule) -> dict[fx.Node, Site]:
    """The sites that a bridge has put into the graph."""
    rule, notes = "bridges/trl_head.py", "TRL's fused head"
    return {
        n: Site("linear_cross_entropy", module_path(n), REPLACED, rule=rule, node=n.name, notes=notes)
        for n in gm.graph.nodes
        if n.target is linear_log_prob
    }


def _plan(counts: Mapping[str, int], options: Options) -> dict[str, str]:
    plan = {}
    regions = counts["checkpoints"]
    if options.memory is not None:
        layers = f"{regions} checkpointed regions" if regions else f"{counts.get('layers', 0)} layers"
        return {"recompute": f"{layers}: as the memory plan says"} | _policies(counts)
    kept = options.recompute == "never" or options.residual == "eager"
    what = "kept in full" if kept else "recomputed in backward"
    plan["recompute"] = f"{regions} checkpointed regions {what}" if regions else "cheap ops only"
    return plan | _policies(counts)


def _policies(counts: Mapping[str, int]) -> dict[str, str]:
    kept = f"{counts['kept']} regions with a policy of the user's are left as they are"
    return {"checkpoint policies": kept} if counts["kept"] else {}


def _not_taken(graph: fx.Graph, options: Options) -> dict[str, str]:
    """Variants that were asked for and that nothing calls."""

    def takes(node: fx.Node, op: str, name: str) -> bool:
        found = variants.called(OPS[op], node.target)
        return node.kwargs.get("variant") == name or (found is not None and found.name == name)

    return {
        f"variant {op}={name}": "asked for, and no site of this graph took it"
        for op, name in options.variants.items()
        if not any(takes(node, op, name) for node in graph.nodes if node.op == "call_function")
    }


def _compile_rest(
    gm: fx.GraphModule,
    untouched: fx.Graph,
    lazy: LazyOutputs | None,
    example_inputs: Sequence[Any],
    options: Options,
    done: Report,
) -> tuple[Callable[..., Any], LazyOutputs | None]:
    """The graph compiled, and its lazy outputs; or, where that fails, the graph as it came, which has none."""
    memory: Memory | None = None
    if options.memory is not None:
        with Attempt("planning memory", "no layer is recomputed", done.errors, options.strict):
            memory = Memory(gm, options, done)
    if options.residual == "eager":
        if memory is not None:
            return _planned(gm, memory, functools.partial(_op_by_op, memory), example_inputs), lazy
        # A checkpoint region that is still there (the user's own policy, or a step that was undone) would draw other
        # dropout masks in backward if it simply ran.
        if any(compat.is_checkpoint(n.target) for n in gm.graph.nodes):
            return compat.compile_with_aot_eager(gm, example_inputs), lazy
        return gm.forward, lazy
    rewritten = compat.copy_graph(gm.graph)
    instead = "the graph runs op by op as it came"
    with Attempt("finding a folder for compiled code", instead, done.errors, options.strict) as folder:
        caches.secure()
    if folder.failed is not None:
        _give_up(gm, untouched, done, options)
        return compat.compile_with_aot_eager(gm, example_inputs), None
    for cache in caches.CACHES:
        if (exchange := caches.exchanged(cache)) is not None:
            done.plan[cache.name] = str(exchange)

    def backward() -> Attempt:
        return Attempt("compiling a backward", "it runs op by op", done.errors, options.strict)

    def compiled(one: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return _inductor(one, inputs, options, backward, memory, done)

    instead = f"it is tried without what is in {caches.INDUCTOR.folder}"
    with Attempt("compiling", instead, done.errors, options.strict):
        return _planned(gm, memory, compiled, example_inputs), lazy
    gm.graph = rewritten
    instead = "the graph is compiled as it came"
    with Attempt("compiling in an empty folder", instead, done.errors), caches.empty_folder():
        return _planned(gm, memory, compiled, example_inputs), lazy
    _give_up(gm, untouched, done, options)
    return compat.compile_with_inductor(gm, example_inputs, _patches(options)), None  # what fails now is not ours


def _op_by_op(memory: Memory, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return compat.compile_with_aot_eager(gm, inputs, memory.partition)


def _planned(
    gm: fx.GraphModule,
    memory: Memory | None,
    compiled: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    inputs: Sequence[Any],
) -> Callable[..., Any]:
    """The graph compiled; where memory is planned, it can be compiled again by another plan."""
    if memory is None:
        return compiled(gm, inputs)
    graph = compat.copy_graph(gm.graph)
    return Planned(memory, lambda now: compiled(fx.GraphModule(gm, compat.copy_graph(graph)), now), inputs)


def _give_up(gm: fx.GraphModule, untouched: fx.Graph, done: Report, options: Options) -> None:
    """The graph as it came, and a report without what was done to it."""
    gm.graph = untouched
    reason = "failed: the graph with it could not be compiled"
    done.sites = [
        replace(s, status=MISSED, reason=reason, work=None, into="") if s.status == REPLACED else s for s in done.sites
    ]
    with _describing(done, options):
        done.modules = describing.described(untouched, describing.modules_of(untouched), {})
    for key in ("recompute", "checkpoint policies", "memory", "sums", *map(ROW.format, ("forward", "backward"))):
        done.plan.pop(key, None)
    done.memory.clear()


def _inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    backward_attempt: Callable[[], Attempt],
    memory: Memory | None,
    done: Report,
) -> Callable[..., Any]:
    of_users = variants.targets()
    ours = [
        n.target
        for n in gm.graph.nodes
        if n.op == "call_function"
        and (str(getattr(n.target, "__module__", "")).startswith("fastft.") or n.target in of_users)
    ]
    # The cache does not see the tags that say what is recomputed.
    stamp = source_hash() + variants.stamp() + options.recompute
    with compat.cache_stamp({"fastft": stamp, **{compat.qualified_name(target): stamp for target in ours}}):
        cut = None if memory is None else memory.partition
        graphs = Graphs(done, options.strict) if options.cuda_graphs else None

        def around(half: compat.Half) -> Callable[[compat.Call], compat.Call]:
            replayed = (lambda call: call) if graphs is None else graphs(half)
            return lambda call: replayed(Rounded(call))

        return compat.compile_with_inductor(
            gm,
            example_inputs,
            _patches(options),
            backward_attempt,
            cut,
            stamp,
            has_offloads,
            around,
            options.cuda_graphs,
        )


def _patches(options: Options) -> dict[str, Any]:
    # A step that is compared with eager must draw the same dropout masks.
    same_draws = {} if options.verify == "never" else {"fallback_random": True}
    # A deep model's asserts, of each input and each op's result, take the host milliseconds a step.
    asserts = dict.fromkeys(("size_asserts", "alignment_asserts"), options.strict)
    return {**asserts, **same_draws, **options.inductor}
