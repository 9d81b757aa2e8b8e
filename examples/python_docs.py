"""Real text that every machine has: instruction pairs from the Python installation itself, and a tokenizer.

A pair asks about something in the standard library and answers with its documentation: a function's or a method's
signature with its docstring, a class with its docstring, a topic of ``help()`` with its text. About 5,000 pairs.
Nothing is downloaded, and no module is imported to be read.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

#: Folders of the installation that hold no documentation of the standard library.
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "lib-dynload", "_pyrepl"}
LONGEST = 600  # characters kept of an answer


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module of the standard library, by name."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not SKIPPED.intersection(parts):
            yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8", errors="replace")


def signatures(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of every public function, class and method of a module that has a docstring."""
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                stack.append((name, node))
                signature = f"class {name}"
            else:
                signature = f"{name}({ast.unparse(node.args)})"
            docstring = ast.get_docstring(node)
            if docstring:
                yield signature, docstring


def pairs(limit: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """``[{"prompt": ..., "completion": ...}, ...]``, shuffled by ``seed``, at most ``limit`` of them."""
    found = [(f"Explain {topic} in Python.", inspect.cleandoc(text)) for topic, text in sorted(topics.items())]
    for module, source in modules():
        with contextlib.suppress(SyntaxError):  # templates and deliberately odd sources that some distributions ship
            tree = ast.parse(source)
            found += [(f"What does {name} do?", docstring) for name, docstring in signatures(tree, module)]
    random.Random(seed).shuffle(found)
    return [{"prompt": f"{prompt}\n", "completion": completion[:LONGEST]} for prompt, completion in found[:limit]]


def dataset(limit: int | None = None, seed: int = 0) -> Dataset:
    """:func:`pairs` as a ``datasets.Dataset`` in TRL's prompt-completion format."""
    return Dataset.from_list(pairs(limit, seed))


def tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts``."""
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1])
