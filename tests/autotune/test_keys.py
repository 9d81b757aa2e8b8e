"""What a training step looks up is what ``fastft tune --model`` measures: the key of each variant, and of each launch.

Nothing is launched: launches are noted, and the keys that they ask for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
import fastft.kernels
from fastft import reporting
from fastft.autotune import database, variants
from fastft.autotune.cases import cases, gradients_for, outputs
from fastft.kernels._config import listening
from fastft.kernels._inputs import New
from fastft.kernels._op import INTERPRET, OPS
from fastft.kernels._triton import HAS_TRITON

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRET, reason="launches are noted in place of Triton's")

BATCH, SEQ = 2, 32
BF16 = torch.bfloat16
_SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    pad_token_id=0,
    use_cache=False,
)
_WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
_GEMMA = dict(query_pre_attn_scalar=16, **_WINDOW)
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
#: model_type → what its config has beside the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **_GEMMA),
    "gemma3_text": _GEMMA,
    "phi3": dict(rope_parameters=_PARTIAL, partial_rotary_factor=0.5),
    "starcoder2": dict(sliding_window=8, use_bias=True),
    "phi": dict(rope_parameters=_PARTIAL, partial_rotary_factor=0.5),
    "stablelm": dict(rope_parameters=_PARTIAL, partial_rotary_factor=0.5),
    "nemotron": dict(rope_parameters=_PARTIAL, partial_rotary_factor=0.5),
}

_NO_MLP = {
    "attention",
    "rotary",
    "norm_rotary",
    "rms_norm",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_prob",
    "lora_linear",
}
#: Pattern → the ops whose variants its sites look up, where they are not the pattern's own.
OPS_OF = {
    "mlp": set(fastft.kernels.load()) - _NO_MLP - {"lora_linears", "nf4_dequantize"},
    "residual_norm": {"rms_norm", "layer_norm"},
    "joint_linears": {"lora_linears"},
    "lora_glu": {"lora_glu", "lora_stack"},
    "lora": {"lora_linear"},
    "nf4": {"lora_linear"},
    "residual": {"lora_linear"},
}

Keys = set[str]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(database, "device_kind", lambda device=None: "h100")
    database.forget()
    torch._dynamo.reset()
    reporting.reset()
    yield
    torch._dynamo.reset()
    database.forget()


def launched(asked: Any) -> Keys:
    return {database.config_key(space, key, "h100") for space, keys in asked.items() for key in keys}


def tuned(config: Any, *dtypes: torch.dtype) -> Keys:
    """As ``GPU.jobs`` has it, for a run of ``fastft tune`` with each of these dtypes."""
    from tests.kernels._launches import noting

    found: Keys = set()
    for case in cases(config.to_dict(), BATCH, SEQ):
        for dtype in dtypes:
            inputs, op = case.make(New(dtype, "cpu")), OPS[case.op]
            assert op.supported(*inputs.args, **inputs.kwargs) is None, case.name
            found.add(variants.site_key(op, inputs.args, inputs.kwargs)[1])
            with noting(), listening() as asked:
                made = outputs(op.call, inputs)
                able = [t for t in made if t.requires_grad]
                if able and inputs.wanted:
                    torch.autograd.grad(able, list(inputs.wanted), gradients_for(made), allow_unused=True)
                found |= launched(asked)
    return found


def asked_for(
    model: Any, given: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, autocast: bool = False
) -> Keys:
    """What one compiled training step looks up."""
    from tests.kernels._launches import noting

    found: Keys = set()
    stock = database.select

    def select(key: str, device: str, explicit: Any = None) -> Any:
        if "/variant of " in key:
            found.add(key)
        return stock(key, device, explicit)

    monkeypatch.setattr(database, "select", select)
    compiled = torch.compile(model.train(), backend="fastft", options={"residual": "eager", "strict": True})
    with noting(), listening() as asked:
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = compiled(**given).loss
        loss.backward()
    report = fastft.report()
    assert not report.errors, str(report)
    # The stream is in fp32 where weights are, and the layers that add to it are not; adapters are in fp32 without it.
    assert {s.pattern for s in report.missed} <= {"residual" if autocast else "lora_glu"}, str(report)
    looked_up = {key.split("/")[1].removeprefix("variant of ") for key in found}
    silent = [pattern for pattern in report.counts if not looked_up & OPS_OF.get(pattern, {pattern})]
    assert not silent, f"no variant is looked up for {silent}"
    return found | launched(asked)


def batch(kind: str = "") -> dict[str, torch.Tensor]:
    ids = torch.randint(1, _SIZES["vocab_size"], (BATCH, SEQ))
    found = {"input_ids": ids, "labels": ids.clone()}
    if kind == "padding":
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][-1, SEQ - 5 :] = 0
    if kind == "packing":
        found["position_ids"] = (torch.arange(SEQ) % (SEQ // 2)).expand(BATCH, SEQ).contiguous()
    return found


def config_of(family: str) -> Any:
    return transformers.AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family]})


def built(config: Any, dtype: torch.dtype, lora: Any = None) -> Any:
    """A model; with ``lora`` its adapters as PEFT makes them, in fp32, on these modules."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model if lora is None else adapted(model, lora)


def adapted(model: Any, modules: Any) -> Any:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=modules, task_type="CAUSAL_LM"))


def check(found: Keys, known: Keys) -> None:
    assert any("/attention.forward/" in key for key in found), "no launch was noted"
    lines = []
    for key in sorted(found - known):
        near = sorted(k for k in known if k.split("/")[1] == key.split("/")[1])
        lines.append("\n    ".join([key, "tuned:", *near]))
    assert not lines, "looked up, and not tuned:\n" + "\n".join(lines)


@pytest.mark.parametrize("lora", [None, "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_asks_for_what_is_tuned(family: str, lora: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(family)
    check(asked_for(built(config, BF16, lora), batch(), monkeypatch), tuned(config, BF16))


@pytest.mark.parametrize("kind", ["padding", "packing"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padded_and_packed(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(family)
    check(asked_for(built(config, BF16), batch(kind), monkeypatch), tuned(config, BF16))


@pytest.mark.parametrize("lora", [None, "all-linear"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_autocast(dtype: torch.dtype, lora: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp32 weights, norms and what they read are in fp32: that is tuned by ``--dtype float32``."""
    config = config_of("llama")
    found = asked_for(built(config, dtype, lora), batch(), monkeypatch, autocast=True)
    check(found, tuned(config, BF16, *({dtype} - {BF16})))
    assert {k.split("/")[2] for k in found if "linear_cross_entropy" in k or "attention" in k} == {"bfloat16"}


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_nf4(double: bool, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    config = config_of("llama")
    model = built(config, BF16)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            made = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=BF16,
                compress_statistics=double,
                quant_type="nf4",
            )
            made.weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                compress_statistics=double,
                quant_type="nf4",
                module=made,
            )
            model.set_submodule(name, made.to("cpu"))
    found = asked_for(adapted(model, modules), batch(), monkeypatch)
    check(found, tuned(config, BF16))
    assert {f"double={int(double)}"} == {k.split("/")[3].split()[-1] for k in found if "/nf4.dequantize/" in k}
