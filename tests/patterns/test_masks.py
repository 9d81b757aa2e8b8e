"""Mask recovery: what is recovered is, number for number, the mask that the graph computes; look-alikes are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fastft.kernels._attention_mask import visible
from fastft.kernels._op import Reason
from fastft.patterns.masks import Structure, recover

B, S = 2, 24


def capture(fn: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[fx.Node, dict[fx.Node, Any]]:
    """The node of ``fn``'s one output in its Dynamo graph, and the value of every node for these inputs."""
    graphs: list[fx.GraphModule] = []
    values: dict[fx.Node, Any] = {}

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)

        def run(*given: Any) -> Any:
            interpreter = fx.Interpreter(gm, garbage_collect_values=False)
            result = interpreter.run(*given)
            values.update(interpreter.env)
            return result

        return run

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph.graph.output_node().args[0][0], values


def check(fn: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Structure:
    """``fn``'s mask is recovered, and the recovered structure hides exactly what it hides."""
    mask, values = capture(fn, *inputs)
    structure = recover(mask)
    assert isinstance(structure, Structure), structure
    wanted = values[mask]
    got = visible(
        *wanted.shape[-2:],
        "cpu",
        causal=structure.causal,
        window=structure.window,
        chunk=structure.chunk,
        padding=values.get(structure.padding),
        positions=values.get(structure.positions),
    )
    got = torch.ones((), dtype=torch.bool) if got is None else got
    assert torch.equal(*torch.broadcast_tensors(got, wanted))
    return structure


# ---------------------------------------------------------------- transformers' own builders

masking = pytest.importorskip("transformers.masking_utils")


def padding() -> torch.Tensor:
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[1, :5] = 0
    mask[0, -3:] = 0
    return mask


def packed() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(7), torch.arange(10), torch.arange(7)]), torch.arange(S)])


class Config:
    """What transformers' mask builders read of a config."""

    _attn_implementation = "sdpa"
    sliding_window = 6
    attention_chunk_size = 5
    is_causal = True
    use_cache = False

    def get_text_config(self, *args: Any, **kwargs: Any) -> Config:
        return self


BUILDERS = {
    "full": (masking.create_causal_mask, {}),
    "sliding": (masking.create_sliding_window_causal_mask, {"window": 6}),
    "chunked": (masking.create_chunked_causal_mask, {"chunk": 5}),
}
INPUTS = {
    "nothing": (None, None, {}),
    "padding": (padding, None, {"padding"}),
    "packed": (None, packed, {"positions"}),
    "arange": (None, lambda: torch.arange(S).expand(B, -1), {}),
}


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_transformers_builders(kind: str, given: str) -> None:
    builder, expected = BUILDERS[kind]
    make_padding, make_positions, tensors = INPUTS[given]

    def build(
        embeds: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        if given == "arange":
            positions = (torch.arange(S) + 0).unsqueeze(0).expand(B, -1)
        return builder(
            config=Config(),
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions,
        )

    embeds = torch.zeros(B, S, 8)
    if make_padding is not None:
        structure = check(lambda e, p: build(e, p, None), embeds, make_padding())
    elif given == "packed":
        structure = check(lambda e, p: build(e, None, p), embeds, make_positions())
    else:
        structure = check(lambda e: build(e, None, None), embeds)
    assert structure.causal
    assert (structure.window, structure.chunk) == (expected.get("window", 0), expected.get("chunk", 0))
    assert {name for name in ("padding", "positions") if getattr(structure, name) is not None} == set(tensors)


# ---------------------------------------------------------------- other spellings


def rows() -> torch.Tensor:
    return torch.arange(S)[None, None, :, None]


def cols() -> torch.Tensor:
    return torch.arange(S)[None, None, None, :]


SPELLINGS = {
    "query >= key": (lambda: rows() >= cols(), "causal"),
    "key < query + 1": (lambda: cols() < rows() + 1, "causal"),
    "1 + query > key": (lambda: 1 + rows() > cols(), "causal"),
    "start and end": (lambda: torch.arange(0, S)[None] <= torch.arange(0, S).unsqueeze(1), "causal"),
    "unsqueezed": (
        lambda: (torch.arange(S).unsqueeze(0) <= torch.arange(S).unsqueeze(-1)).unsqueeze(0).unsqueeze(0),
        "causal",
    ),
    "indexed later": (lambda: (torch.arange(S)[None, :] <= torch.arange(S)[:, None])[None, None], "causal"),
    "tril": (lambda: torch.ones(S, S, dtype=torch.bool).tril()[None, None], "causal"),
    "torch.tril": (lambda: torch.tril(torch.ones(S, S, dtype=torch.bool)), "causal"),
    "logical_and": (lambda: torch.logical_and(cols() <= rows(), cols() > rows() - 4), "causal & window(4)"),
    "window by >=": (lambda: (cols() <= rows()) & (cols() >= rows() - 3), "causal & window(4)"),
    "window from the other side": (lambda: (cols() <= rows()) & (rows() - 4 < cols()), "causal & window(4)"),
    "narrower of two windows": (
        lambda: (cols() <= rows()) & (cols() > rows() - 4) & (cols() > rows() - 9),
        "causal & window(4)",
    ),
    "chunks": (lambda: (cols() // 5 == rows() // 5) & (cols() <= rows()), "causal & chunk(5)"),
    "every position": (lambda: (rows() >= 0) & (cols() <= rows()), "causal"),
    "all": (lambda: torch.ones(B, 1, S, S, dtype=torch.bool), "full"),
    "chunks alone": (lambda: torch.floor_divide(cols(), 5) == rows() // 5, "chunk(5)"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    fn, expected = SPELLINGS[spelling]
    assert str(check(fn)) == expected


def test_padding_by_broadcasting() -> None:
    structure = check(lambda m: (cols() <= rows()) & m.bool()[:, None, None, :], padding())
    assert str(structure).startswith("causal & padding[")
    assert check(lambda m: m[:, None, None, :].expand(B, 1, S, S), padding().bool()).padding is not None


def test_padding_is_the_tensor_below_its_casts() -> None:
    """So that masks of several kinds share one operand."""
    mask, _ = capture(lambda m: (cols() <= rows()) & m.to(torch.bool)[:, None, None, :], padding())
    structure = recover(mask)
    assert structure.padding.op == "placeholder"


def documents(p: torch.Tensor, prepend: torch.Tensor) -> torch.Tensor:
    ids = (torch.diff(p, prepend=prepend, dim=-1) != 1).cumsum(-1)
    b = torch.arange(B)[:, None, None, None]
    return (cols() <= rows()) & (ids[b, rows()] == ids[b, cols()])


def test_packed() -> None:
    assert check(lambda p: documents(p, p[:, :1] - 1), packed()).positions is not None


# ---------------------------------------------------------------- look-alikes

P = padding().bool()
LOOKALIKES: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "not the first": (lambda: (rows() >= 1) & (cols() <= rows()), ()),
    "strictly below": (lambda: cols() < rows(), ()),
    "one to the right": (lambda: cols() <= rows() + 1, ()),
    "anticausal": (lambda: cols() >= rows() + 1, ()),
    "keys counted twice": (lambda: 2 * cols() <= rows(), ()),
    "union": (lambda m: (cols() <= rows()) | m[:, None, None, :], (P,)),
    "padding of queries": (lambda m: (cols() <= rows()) & m[:, None, :, None], (P,)),
    "negated padding": (lambda m: (cols() <= rows()) & ~m[:, None, None, :], (P,)),
    "an input": (lambda m: m & True, (torch.rand(B, 1, S, S) > 0.5,)),
    "an input [S, S]": (lambda m: (cols() <= rows()) & m, (torch.rand(S, S) > 0.5,)),
    "prepend + 1": (lambda p: documents(p, p[:, :1] + 1), (packed(),)),
    "prepend of another": (lambda p, o: documents(p, o[:, :1] - 1), (packed(), packed())),
    "documents of two": (
        lambda p, o: (p[:, None, :, None] == o[:, None, None, :]) & (cols() <= rows()),
        (packed(), packed()),
    ),
    "shifted batch": (lambda m: m[1 - torch.arange(B)[:, None, None, None], cols()] & (cols() <= rows()), (P,)),
    "shifted keys": (lambda m: m[torch.arange(B)[:, None, None, None], cols() - 1] & (cols() <= rows()), (P,)),
    "chunks of two sizes": (lambda: (cols() // 5 == rows() // 6) & (cols() <= rows()), ()),
    "two chunks": (lambda: (cols() // 5 == rows() // 5) & (cols() // 4 == rows() // 4), ()),
    "chunks from elsewhere": (lambda m: (cols() // 5 == rows() // 5) & m[:, None, None, :] & (cols() <= rows()), (P,)),
    "rows reversed": (lambda: torch.arange(S).flip(0)[None] <= torch.arange(S)[:, None], ()),
    "step of two": (lambda: torch.arange(0, 2 * S, 2)[None] <= torch.arange(S)[:, None], ()),
    "triangle moved": (lambda: torch.ones(S, S, dtype=torch.bool).tril(1), ()),
    "nothing": (lambda: torch.zeros(S, S, dtype=torch.bool), ()),
    "integers": (lambda g: g[torch.arange(B)[:, None, None, None], cols()] & (cols() <= rows()), (padding(),)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_look_alikes_are_refused(name: str) -> None:
    fn, inputs = LOOKALIKES[name]
    mask, _ = capture(fn, *inputs)
    reason = recover(mask)
    assert isinstance(reason, Reason) and reason.code == "mask" and str(reason), reason


def test_window_without_causality_is_told_apart() -> None:
    """A two-sided window is recovered as far as it goes, and the op refuses it."""
    structure = check(lambda: cols() > rows() - 4)
    assert not structure.causal and structure.window == 4


def test_dynamic_sizes() -> None:
    """Lengths may be symbolic."""

    def build(m: torch.Tensor) -> torch.Tensor:
        s = m.shape[1]
        q, k = torch.arange(s)[None, None, :, None], torch.arange(s)[None, None, None, :]
        return ((k <= q) & (k > q - 3) & m.bool()[:, None, None, :]).expand(m.shape[0], 1, s, s)

    m = padding()
    torch._dynamo.mark_dynamic(m, 1)
    mask, _ = capture(build, m)
    assert str(recover(mask)).startswith("causal & window(3) & padding[")
