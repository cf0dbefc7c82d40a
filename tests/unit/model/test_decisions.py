import sys
from types import SimpleNamespace

import pytest
import torch

from tokmask_peft.errors import ModelError
from tokmask_peft.model import decisions
from tokmask_peft.recipe import ModelConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "choice"),
    [({"avx2"}, "fp32"), ({"avx512_bf16", "avx2"}, "bf16"), ({"amx_bf16"}, "bf16"), (set(), "fp32")],
)
def test_bf16_only_where_the_cpu_has_it(monkeypatch, flags, choice):
    monkeypatch.setattr(decisions, "cpu_flags", lambda: frozenset(flags))
    assert decisions.choose_precision(ModelConfig(backbone="x"), CPU).choice == choice
    forced = decisions.choose_precision(ModelConfig(backbone="x", precision="fp32"), CPU)
    assert (forced.choice, forced.reason) == ("fp32", "set in the recipe")


def test_quantization_auto_falls_back_with_the_reason_and_nf4_insists(monkeypatch):
    monkeypatch.setattr(decisions, "bitsandbytes_problem", lambda kind: "bitsandbytes cannot be imported (gone)")
    fallback = decisions.choose_quantization(ModelConfig(backbone="x"), CPU)
    assert (fallback.choice, fallback.reason) == ("none", "bitsandbytes cannot be imported (gone)")
    with pytest.raises(ModelError, match=r"model.quantization is nf4, but .*quantization=none"):
        decisions.choose_quantization(ModelConfig(backbone="x", quantization="nf4"), CPU)


def test_quantization_auto_takes_nf4_where_bitsandbytes_runs(monkeypatch):
    monkeypatch.setattr(decisions, "bitsandbytes_problem", lambda kind: None)
    assert decisions.choose_quantization(ModelConfig(backbone="x"), CPU).choice == "nf4"
    assert decisions.choose_quantization(ModelConfig(backbone="x", quantization="none"), CPU).choice == "none"


def test_a_bitsandbytes_that_fails_without_a_word_is_a_reason_too(monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(nn=SimpleNamespace(Linear4bit=fail)))
    problem = decisions.bitsandbytes_problem.__wrapped__("cpu")  # past the cache
    assert problem == "bitsandbytes does not run on cpu (NotImplementedError)"


def test_looking_for_bitsandbytes_draws_no_random_numbers():
    pytest.importorskip("bitsandbytes")
    before = torch.get_rng_state()
    decisions.bitsandbytes_problem.__wrapped__("cpu")  # not the cached answer
    assert torch.equal(torch.get_rng_state(), before)
