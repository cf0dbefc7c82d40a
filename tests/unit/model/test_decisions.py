import sys
from types import SimpleNamespace

import pytest
import torch

from tokmask_peft.errors import ModelError
from tokmask_peft.model import decisions
from tokmask_peft.recipe.schema import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """Return a function that puts another system and CPU in this one's place."""
    decisions.cpu_flags.cache_clear()

    def put(system, machine, capabilities=None, predicate=None, cpuinfo=None):
        monkeypatch.setattr(decisions.platform, "system", lambda: system)
        monkeypatch.setattr(decisions.platform, "machine", lambda: machine)
        for name, answer in (("get_capabilities", capabilities), ("_is_avx512_bf16_supported", predicate)):
            monkeypatch.delattr(torch.cpu, name, raising=False)
            if answer is not None:
                monkeypatch.setattr(
                    torch.cpu, name, answer if callable(answer) else lambda it=answer: it, raising=False
                )
        monkeypatch.setattr(decisions, "CPUINFO", tmp_path / "cpuinfo")
        if cpuinfo is not None:
            decisions.CPUINFO.write_text(f"processor : 0\n{cpuinfo}\nbugs :\n")

    yield put
    decisions.cpu_flags.cache_clear()


def fail(*_, **__):
    raise NotImplementedError  # a RuntimeError, without a word


X86 = {"architecture": "x86_64", "avx2": True, "l1d_cache_size": 49152, "cpu_name": "Some CPU"}
LACKS = "would emulate bf16"


@pytest.mark.parametrize(
    ("machine", "choice", "reason"),
    [
        (("Windows", "AMD64", X86 | {"avx512_bf16": True, "amx_bf16": False}), "bf16", "the CPU has avx512_bf16"),
        (("Linux", "x86_64", X86 | {"avx512_bf16": False, "amx_bf16": True}), "bf16", "the CPU has amx_bf16"),
        (("Windows", "AMD64", X86 | {"avx512_bf16": False}), "fp32", LACKS),
        (("Linux", "x86_64", {"architecture": "unknown"}, None, "flags : avx2 amx_bf16"), "bf16", "has amx_bf16"),
        (("Linux", "x86_64", None, False, "flags : avx2 avx512_bf16"), "bf16", "the CPU has avx512_bf16"),
        (("Linux", "x86_64", None, None, "flags : avx2"), "fp32", LACKS),
        (("Windows", "AMD64", None, True), "bf16", "the CPU has avx512_bf16"),
        (("Windows", "AMD64", None, False), "fp32", LACKS),
        (("Windows", "AMD64"), "fp32", "neither torch nor Windows reports"),
        (("Windows", "AMD64", fail), "fp32", "neither torch nor Windows reports"),
        (("Linux", "x86_64", None, None, "vendor_id : x"), "fp32", "neither torch nor Linux reports"),
        (("Darwin", "arm64", {"architecture": "arm64", "bf16": True}), "fp32", "measured on arm64 CPUs"),
        (("Linux", "aarch64", None, None, "Features : neon bf16"), "fp32", "measured on aarch64 CPUs"),
    ],
)
def test_bf16_only_where_the_cpu_is_known_to_have_it(cpu, machine, choice, reason):
    cpu(*machine)
    found = decisions.choose_precision(ModelConfig(backbone="x"), CPU)
    assert found.choice == choice
    assert reason in found.reason
    forced = decisions.choose_precision(ModelConfig(backbone="x", precision="fp32"), CPU)
    assert (forced.choice, forced.reason) == ("fp32", "set in the recipe")


def test_quantization_auto_falls_back_with_the_reason_and_nf4_insists(monkeypatch):
    monkeypatch.setattr(decisions, "bitsandbytes_problem", lambda kind: "bitsandbytes cannot be imported (gone)")
    fallback = decisions.choose_quantization(ModelConfig(backbone="x"), CPU)
    assert (fallback.choice, fallback.reason) == ("none", "bitsandbytes cannot be imported (gone)")
    with pytest.raises(ModelError, match="quantization=none") as caught:
        decisions.choose_quantization(ModelConfig(backbone="x", quantization="nf4"), CPU)
    assert caught.value.code == "quantization-unavailable"
    assert caught.value.fields == {"quantization": "nf4", "device": "cpu"}
    monkeypatch.setattr(decisions, "bitsandbytes_problem", lambda kind: None)
    assert decisions.choose_quantization(ModelConfig(backbone="x"), CPU).choice == "nf4"
    assert decisions.choose_quantization(ModelConfig(backbone="x", quantization="none"), CPU).choice == "none"


def test_a_bitsandbytes_that_fails_without_a_word_is_a_reason_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(nn=SimpleNamespace(Linear4bit=fail)))
    problem = decisions.bitsandbytes_problem.__wrapped__("cpu")  # past the cache
    assert problem == "bitsandbytes does not run on cpu (NotImplementedError)"


def test_looking_for_bitsandbytes_draws_no_random_numbers_and_a_torch_without_the_device_is_a_reason():
    pytest.importorskip("bitsandbytes")
    before = torch.get_rng_state()
    decisions.bitsandbytes_problem.__wrapped__("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    if not torch.cuda.is_available():
        assert "does not run on cuda" in decisions.bitsandbytes_problem.__wrapped__("cuda")


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_checkpointing_is_switched_on_by_the_name_that_this_transformers_has(name):
    called = []
    model = SimpleNamespace(disable_input_require_grads=lambda: called.append("no gradients of inputs"))
    setattr(model, name, called.append)
    decisions.enable_checkpointing(model)
    assert called == [{"use_reentrant": False}, "no gradients of inputs"]
