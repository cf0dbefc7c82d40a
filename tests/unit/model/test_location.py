"""How long a text a backbone can read, by its config: as long as one that runs, and not one sub-token longer."""

import pytest
import torch
import transformers
from tiny_models import build

from tokmask_peft.errors import RecipeError
from tokmask_peft.model.location import check_length, config_at_hand, position_limit
from tokmask_peft.recipe.schema import ModelConfig, Recipe

ANY_LENGTH = ("modernbert", "qwen2", "llama", "T5")
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
}
OTHERS = {
    **dict.fromkeys(("Roberta", "Camembert", "MPNet", "IBert", "Electra", "Nystromformer"), SMALL),
    "GPT2": {"vocab_size": 40, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 1},
    "OPT": {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "T5": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "n_positions": 24},
}


def runs(model, length):
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", ["bert", "xlm-r", "distilbert", "modernbert", "qwen2", "llama", *OTHERS])
def test_the_longest_text_runs_and_a_longer_one_does_not(name):
    if name in OTHERS:
        config = getattr(transformers, f"{name}Config")(**OTHERS[name])
        model = transformers.T5EncoderModel(config) if name == "T5" else transformers.AutoModel.from_config(config)
    else:
        model, _ = build(name)
        config = model.config
    limit = position_limit(config.to_dict())
    assert (limit is None) == (name in ANY_LENGTH)
    assert name in OTHERS or limit in (None, 64 - config.pad_token_id - 1 if name == "xlm-r" else 64)
    assert runs(model.eval(), limit or 200)
    assert limit is None or not runs(model, limit + 1)


def test_a_config_at_hand_is_checked_and_another_is_not(model_config):
    recipe = Recipe.load("quickstart", ["data.max_length=65"])
    check_length(recipe, config_at_hand(ModelConfig(backbone="nobody/knows-this")))
    with pytest.raises(RecipeError) as caught:
        check_length(recipe, config_at_hand(model_config("bert")))
    assert (caught.value.code, caught.value.fields["limit"]) == ("too-long", 64)
    assert "set data.max_length=64" in str(caught.value)
