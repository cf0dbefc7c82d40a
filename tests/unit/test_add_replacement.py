"""A way to replace tokens added from outside the package: masked tokens become random ordinary tokens."""

import pytest
import torch
from tiny_models import build, encode, seen_ids

from tokmask_peft.masking import TokenMaskConfig, TokenMasker
from tokmask_peft.masking.replacement import REPLACEMENTS, Replacement
from tokmask_peft.recipe.loading import load_recipe


# -- the example of CONTRIBUTING --
class RandomTokens(Replacement):
    """Masked tokens become random tokens of the vocabulary, none of them special or protected."""

    def __init__(self, mask_token, maskable, tokenizer):
        super().__init__(mask_token, maskable, tokenizer)
        used = torch.tensor(sorted(tokenizer.get_vocab().values()))
        self.ordinary = used[maskable[used]]

    def __call__(self, input_ids, masked, draw):
        ordinary = self.ordinary.to(input_ids.device)
        return torch.where(masked, ordinary[draw() % len(ordinary)], input_ids)


# REPLACEMENTS["random_tokens"] = RandomTokens
# -- end --


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REPLACEMENTS, "random_tokens", RandomTokens)


def looked_up(replace, steps=(0,), compiled=False):
    model, tokenizer = build("bert")
    ids = encode(tokenizer)["input_ids"]
    embedding = model.train().get_input_embeddings()
    call = torch.compile(lambda ids: embedding(ids), backend="eager", fullgraph=True) if compiled else embedding
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5, replace=replace), seed=3) as masker:
        if compiled:
            masker.step = steps[0]
            return call(ids)
        with seen_ids(model) as seen:
            for step in steps:
                masker.step = step
                call(ids)
    return ids, seen, masker, embedding


def test_the_same_places_get_random_ordinary_tokens():
    ids, (one, again, later), masker, embedding = looked_up("random_tokens", steps=(0, 0, 1))
    places = looked_up("token")[1][0] == masker.mask_token.id
    assert places.sum() > 20
    assert torch.equal(one[~places], ids[~places])
    assert (one != ids)[places].float().mean() > 0.9
    assert masker._maskable[one[places]].all()
    assert len(one[places].unique()) > 10
    assert torch.equal(one, again)
    assert not torch.equal(one, later)
    assert torch.equal(looked_up("random_tokens", compiled=True), torch.nn.functional.embedding(one, embedding.weight))


def test_a_recipe_names_it():
    assert load_recipe("quickstart", ["masking.replace=random_tokens"]).masking.replace == "random_tokens"
