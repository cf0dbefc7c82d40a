"""The code on a model card: how to load the adapter with stock PEFT, or the merged model with a pipeline."""

from __future__ import annotations

from tokmask_peft.recipe import Recipe

PLACEHOLDER = "PATH_OR_HUB_ID"
"""Stands in the snippet of a card for the place of the adapter, which a push knows."""

AUTO = {
    "sequence": "AutoPeftModelForSequenceClassification",
    "token": "AutoPeftModelForTokenClassification",
}
"""PEFT's class that loads an adapter of each task."""

_USE = {
    "sequence": """\
inputs = tokenizer(["This phone is bien bonito"], return_tensors="pt", padding=True)
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1)
print([labels[i] for i in probabilities.argmax(-1)])""",
    "token": """\
words = "This phone is bien bonito".split()
{encode}
with torch.no_grad():
    predicted = model(**inputs).logits.argmax(-1)[0]
word_ids = inputs.word_ids()
first = [i for i, word in enumerate(word_ids) if word is not None and word not in word_ids[:i]]
print([(words[word_ids[i]], labels[predicted[i]]) for i in first])""",
}

PIPELINE_SNIPPET = {
    "sequence": f"""\
from transformers import pipeline

classify = pipeline("text-classification", model="{PLACEHOLDER}")
print(classify(["This phone is bien bonito"]))""",
    "token": f"""\
from transformers import pipeline

# neighbouring words with the same label come as one piece
tag = pipeline("token-classification", model="{PLACEHOLDER}", aggregation_strategy="first", ignore_labels=[])
print([(part["word"], part["entity_group"]) for part in tag("This phone is bien bonito")])""",
}


def loading_snippet(
    recipe: Recipe, labels: list[str], auto: str, folder: str = PLACEHOLDER, spaced_words: bool = False
) -> str:
    """Return Python that loads the adapter with stock PEFT and predicts, labels included."""
    pieces, lead = "words", ""
    if spaced_words:
        pieces, lead = "spaced", 'spaced = [words[0], *(f" {word}" for word in words[1:])]  # as in a running text\n'
    encode = f'{lead}inputs = tokenizer({pieces}, is_split_into_words=True, return_tensors="pt")'
    return (
        f"import torch\nfrom peft import {auto}\nfrom transformers import AutoTokenizer\n\n"
        f'adapter = "{folder}"\n'
        f"labels = {labels!r}\n"
        f"model = {auto}.from_pretrained(\n"
        "    adapter, num_labels=len(labels), id2label=dict(enumerate(labels)),\n"
        "    label2id={label: i for i, label in enumerate(labels)},\n"
        ").eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
        "model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id\n\n"
        + _USE[recipe.data.task].format(encode=encode)
    )
