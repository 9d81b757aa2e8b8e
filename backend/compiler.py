"""What ``torch.compile(model, backend="fastft")`` calls: one function, numbered steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fastft import _torch_compat as compat
from fastft import bridges, reporting
from fastft.kernels.linear_cross_entropy import linear_log_prob
from fastft.normalise import normalise
from fastft.options import Options
from fastft.outputs import LazyOutputs, drop_lazy, with_lazy
from fastft.reporting import REPLACED, Report, Site
from fastft.rewrite import module_path, rewrite
from fastft.stamp import source_hash
from fastft.verifying import FirstStep

log = logging.getLogger("fastft")

# torch imports this module when it looks the backend up: before anything is traced, so what must change tracing is
# put in place here.
bridges.install()


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
    asked = Options.of(options, mode)
    done = Report(graphs=1, recompiles=int(compat.is_recompile()))
    untouched = compat.copy_graph(gm.graph)
    plain = fx.GraphModule(gm, compat.copy_graph(gm.graph)) if asked.verify == "first_step" else None
    try:
        lazy = transform(gm, asked, done)
    except Exception as error:
        if asked.strict:
            raise
        # Training goes on: this graph is compiled as it came, and the report says so.
        log.warning("fastft left a graph to Inductor: %s: %s", type(error).__name__, error, exc_info=True)
        done.errors.append(f"rewriting failed, the graph was compiled without it: {type(error).__name__}: {error}")
        done.sites, done.plan, lazy = [], {}, None
        gm.graph = untouched
    # 6. Compile the rest.
    start = time.perf_counter()
    compiled = _compile_rest(gm, example_inputs, asked)
    done.timings["compile"] = time.perf_counter() - start
    reporting.add(done)
    log.info("compiled a graph: %s", done.counts)
    # 7. Wrap the callable.
    call = with_lazy(compiled, lazy) if lazy is not None else compiled
    return FirstStep(call, plain, done, asked) if plain is not None else call


def transform(gm: fx.GraphModule, options: Options, done: Report) -> LazyOutputs | None:
    """Steps 2 to 5, in place. Fills ``done``; returns which outputs are lazy now."""
    start = time.perf_counter()
    # 2. Normalise: one flat graph.
    counts = normalise(gm, recompute=options.recompute == "asked")
    bridged = [
        Site(
            "linear_cross_entropy",
            module_path(n),
            REPLACED,
            rule="bridges/trl_head.py",
            node=n.name,
            notes="TRL's fused head",
        )
        for n in gm.graph.nodes
        if n.target is linear_log_prob
    ]
    # 3., 4. Match and rewrite, each rewrite checked.
    rewritten = rewrite(gm, options, compat.fake_mode_of(gm))
    done.sites = bridged + rewritten.sites
    lazy = drop_lazy(gm, rewritten.lazy) if options.lazy_logits else None
    # 5. Plan: what the user put under checkpointing is recomputed layer by layer, cheap ops always.
    regions = counts["checkpoints"]
    kept = options.recompute == "never" or options.residual == "eager"
    what = "kept in full" if kept else "recomputed in backward"
    done.plan["recompute"] = f"{regions} checkpointed regions {what}" if regions else "cheap ops only"
    if counts["kept"]:
        done.plan["checkpoint policies"] = f"{counts['kept']} regions with a policy of the user's are left as they are"
    gm.graph.lint()
    gm.recompile()
    done.timings["rewrite"] = time.perf_counter() - start
    return lazy


def _compile_rest(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.residual == "eager":
        # A checkpoint region that is still there (the user's own policy, or a graph that was given up) would draw other
        # dropout masks in backward if it simply ran.
        if any(compat.is_checkpoint(n.target) for n in gm.graph.nodes):
            return compat.compile_with_aot_eager(gm, example_inputs)
        return gm.forward
    ours = [
        n.target
        for n in gm.graph.nodes
        if n.op == "call_function" and str(getattr(n.target, "__module__", "")).startswith("fastft.")
    ]
    stamp = source_hash()
    with compat.cache_stamp({"fastft": stamp, **{compat.qualified_name(target): stamp for target in ours}}):
        # A step that is compared with eager must draw the same dropout masks.
        same_draws = {} if options.verify == "never" else {"fallback_random": True}
        return compat.compile_with_inductor(gm, example_inputs, {**same_draws, **options.inductor})
