"""torch.compile: no graph break at the hook, no recompilation as rate and step move, no hook ignored in silence."""

import pytest
import torch
from tiny_models import build, encode
from torch._dynamo.testing import CompileCounter

from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe import TokenMaskConfig


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_one_graph_for_all_rates_and_steps(family):
    model, tokenizer = build(family, num_hidden_layers=1)
    model.train()
    batch = encode(tokenizer)
    plain = model(**batch).logits
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with TokenMasker.attach(compiled, tokenizer, TokenMaskConfig(p=0.5)) as masker:
        outputs = []
        for rate in (0.5, 0.2, 0.5):
            masker.rate = rate
            outputs.append(compiled(**batch).logits)
        assert counter.frame_count == 1
        assert masker.step == 3
        for step, rate in enumerate((0.5, 0.2, 0.5)):
            masker.rate, masker.step = rate, step
            torch.testing.assert_close(outputs[step], model(**batch).logits)
            assert not torch.allclose(outputs[step], plain, atol=1e-3)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    torch.testing.assert_close(compiled(**batch).logits, plain)


def test_spans_of_words_compile_too_and_lengths_may_vary():
    model, tokenizer = build("qwen2")
    embedding = model.get_input_embeddings().train()
    counter = CompileCounter()
    compiled = torch.compile(lambda ids: embedding(ids), backend=counter, fullgraph=True, dynamic=True)
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5, unit="span")) as masker:
        for texts in (2, 3, 5):
            ids = encode(tokenizer)["input_ids"][:texts, : 10 + texts]
            masker.step = texts
            output = compiled(ids)
            masker.step = texts
            assert torch.equal(output, embedding(ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_compiled_and_called_before_is_masked(in_place):
    model, tokenizer = build("bert", num_hidden_layers=1)
    model.train()
    batch = encode(tokenizer)
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    plain = compiled(**batch).logits
    with TokenMasker.attach(compiled, tokenizer, TokenMaskConfig(p=0.5)) as masker:
        assert not torch.allclose(compiled(**batch).logits, plain, atol=1e-3)
        assert masker.step == 1
    assert torch.equal(compiled(**batch).logits, plain)


def test_gradients_through_aot_autograd():
    model, tokenizer = build("bert", num_hidden_layers=1)
    model.train()
    batch = {**encode(tokenizer), "labels": torch.arange(8) % 3}
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker:
            call(**batch).loss.backward()
            assert masker.step == 1
        gradients.append(model.classifier.weight.grad.clone())
    torch.testing.assert_close(*gradients)
