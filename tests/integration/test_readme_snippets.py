"""The Python of the README runs, in its order, in one session."""

import re
from pathlib import Path

import pytest
from tiny_models import build
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

README = Path(__file__).parents[2] / "README.md"
FEWER = '"training.baseline=false", "training.max_steps=2"'


@pytest.mark.usefixtures("few_posts")
def test_the_snippets_of_the_readme(tmp_path, monkeypatch):
    model, tokenizer = build("bert")
    monkeypatch.chdir(tmp_path)
    texts = [{**tokenizer(text), "labels": label} for text, label in [("me gusta", 1), ("no me gusta", 0)] * 4]
    collator = DataCollatorWithPadding(tokenizer)
    args = TrainingArguments(output_dir="out", max_steps=2, report_to="none", use_cpu=True)
    session = {
        "Trainer": Trainer, "model": model, "args": args, "texts": texts, "collator": collator, "tokenizer": tokenizer,
        "loader": DataLoader(texts, batch_size=4, collate_fn=collator),
    }  # fmt: skip
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(snippet.replace('"training.max_steps=20"', FEWER), session)
    assert session["trainer"].state.global_step == 2
    assert session["explanation"].words
