"""The implementations that training steps are measured of: how each loads a model, compiles it, and wants its data; and
the checkpoints of random weights that all of them load.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.shapes import MODELS, linears

if TYPE_CHECKING:
    from bench.setting import Setup

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
#: Environment of every run: no network, nothing sent anywhere, no unasked threads of the tokenizer.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def say(text: str) -> None:
    print(f"[bench {time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# -- models ------------------------------------------------------------------------------------------------------------


def checkpoint_root() -> Path:
    """Where checkpoints go: ``FASTFT_BENCH_CHECKPOINTS``, /dev/shm where 40 GiB are free, or the temporary folder."""
    if asked := os.environ.get("FASTFT_BENCH_CHECKPOINTS"):
        return Path(asked)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 40 * GIB
    return (memory if roomy else Path(tempfile.gettempdir())) / "fastft-bench"


def write_checkpoint(model: str, folder: Path) -> None:
    """Write a bf16 checkpoint of ``model`` with random weights to ``folder``, with a tokenizer beside it.

    Made on the GPU where there is one. Nobody reads text here, but Unsloth's loader asks for a tokenizer, so a small
    one is trained in memory.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    fields = dict(MODELS[model])
    config = AutoConfig.for_model(
        fields.pop("model_type"), **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **fields}
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([__doc__ or ""], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        built.save_pretrained(partial, max_shard_size="2GB")
        wrapped.save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)  # whole or not at all
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def checkpoint(model: str, root: Path) -> Path:
    """The folder of ``model``'s checkpoint under ``root``, written first, by another process, if it is not there."""
    folder = root / model
    if not (folder / "config.json").exists():
        say(f"writing a checkpoint of {model} to {folder}")
        subprocess.run(
            [sys.executable, str(ROOT / "bench/train.py"), "checkpoint", "--model", model, "--checkpoints", str(root)],
            check=True,
            env={**os.environ, **QUIET},
        )
    return folder


def arguments_of(setup: Setup) -> dict[str, Any]:
    """What ``from_pretrained`` gets."""
    import torch
    from transformers import BitsAndBytesConfig

    arguments: dict[str, Any] = {"dtype": torch.bfloat16}
    if torch.cuda.is_available():
        arguments["device_map"] = {"": 0}
    if setup.quant == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return arguments


def targets_of(setup: Setup) -> list[str]:
    return [name for name, _, _ in linears(setup.model)]


def _prepare(model: Any, setup: Setup) -> Any:
    """Checkpointing and LoRA on a stock transformers model, in the order in which TRL does them."""
    model.config.use_cache = False
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if setup.train == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=setup.rank,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=targets_of(setup),
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model.train()


def load_stock(setup: Setup, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return _prepare(AutoModelForCausalLM.from_pretrained(folder, **arguments_of(setup)), setup)


def load_liger(setup: Setup, folder: Path) -> Any:
    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    return _prepare(AutoLigerKernelForCausalLM.from_pretrained(folder, **arguments_of(setup)), setup)


def import_unsloth() -> None:
    import unsloth  # noqa: F401  (it must come before transformers)


def import_unsloth_with_xformers() -> None:
    """For attention by xformers, which knows packed documents. Its wheels are built for CUDA 12; beside a PyTorch for
    CUDA 13 they load once CUDA 12's runtime is in the process.
    """
    name = "libcudart.so.12"
    installed = [path for folder in sys.path if (path := Path(folder, "nvidia/cuda_runtime/lib", name)).exists()]
    try:
        ctypes.CDLL(str(installed[0]) if installed else name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"unsloth_xformers needs {name}: pip install nvidia-cuda-runtime-cu12 ({error})") from error
    import_unsloth()
    from unsloth.utils.attention_dispatch import HAS_XFORMERS

    if not HAS_XFORMERS:
        raise ImportError("unsloth_xformers: Unsloth has found no xformers that works here; its output says why")


def load_unsloth(setup: Setup, folder: Path) -> Any:
    import torch
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if setup.checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=setup.seq,
        dtype=torch.bfloat16,
        load_in_4bit=setup.quant == "nf4",
        full_finetuning=setup.train == "full",
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,  # the folder, not a name of a repository that the folder's name resembles
    )
    if setup.train == "lora":
        model = FastLanguageModel.get_peft_model(
            model,
            r=setup.rank,
            target_modules=targets_of(setup),
            lora_alpha=16,
            lora_dropout=0.0,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            max_seq_length=setup.seq,
            random_state=setup.seed,
        )
    return FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)


def _layers(model: Any) -> Iterator[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    yield from base.model.layers


def _compile(module: Any, options: dict[str, Any], **more: Any) -> None:
    """``dynamic`` is an argument of ``torch.compile``, all else are its options."""
    dynamic, rest = options.get("dynamic"), {name: value for name, value in options.items() if name != "dynamic"}
    module.compile(options=rest or None, dynamic=dynamic, **more)


def compile_inductor(model: Any, options: dict[str, Any]) -> None:
    _compile(model, options)


def compile_dynamo(model: Any, options: dict[str, Any]) -> None:
    """Dynamo's graph run op by op: no backend's first step takes less than this one's."""
    _compile(model, options, backend="eager")


def compile_layers(model: Any, options: dict[str, Any]) -> None:
    for layer in _layers(model):
        _compile(layer, options)


def compile_fastft(model: Any, options: dict[str, Any]) -> None:
    _compile(model, options, backend="fastft")


# -- implementations ---------------------------------------------------------------------------------------------------


def in_one_row(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """A packed batch as Unsloth's own trainer makes it: rows behind each other in one, since it knows documents in one
    row alone, and beside them their lengths, on the CPU.
    """
    import torch

    flat = {name: value.view(1, -1) for name, value in batch.items()}
    return {**flat, "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}


@dataclass(frozen=True)
class Implementation:
    """How an implementation loads a model and, if it does, compiles it in place. ``peer``: it has its own packages.
    ``first``: what comes before transformers is imported. ``pack``: what it makes of a packed batch and its documents'
    lengths, if it wants them otherwise.
    """

    load: Callable[[Setup, Path], Any]
    compile: Callable[[Any, dict[str, Any]], None] | None = None
    peer: bool = False
    first: Callable[[], None] | None = None
    pack: Callable[[dict[str, Any], Sequence[int]], dict[str, Any]] | None = None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "eager": Implementation(load_stock),
    "dynamo": Implementation(load_stock, compile_dynamo),
    "inductor": Implementation(load_stock, compile_inductor),
    "inductor_layers": Implementation(load_stock, compile_layers),
    "liger": Implementation(load_liger, peer=True),
    "liger_inductor_layers": Implementation(load_liger, compile_layers, peer=True),
    "unsloth": Implementation(load_unsloth, peer=True, first=import_unsloth, pack=in_one_row),
    "unsloth_xformers": Implementation(load_unsloth, peer=True, first=import_unsloth_with_xformers, pack=in_one_row),
    "fastft": Implementation(load_stock, compile_fastft),
}


#: Implementation → what ``SFTConfig`` is told: the backend of ``torch.compile``, None for none.
SFT_BACKENDS = {"eager": None, "inductor": "inductor", "fastft": "fastft"}
