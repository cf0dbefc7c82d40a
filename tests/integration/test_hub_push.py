"""Pushing to the Hub, against a stand-in on loopback: over and back byte by byte, and every way to fail.

huggingface_hub reads its settings when it is imported, so every push runs in a process of its own.
"""

from __future__ import annotations

import ast
import getpass
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

from tokmask_peft import load, train
from tokmask_peft.recipe.schema import Recipe

REPO = "zelda/moods"
BASE = "castle/tiny-bert"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_folder, tiny_backbone) -> Path:
    """A run whose backbone has an id on the Hub, though it was loaded from a folder."""
    path = tmp_path_factory.mktemp("push") / "recipe.yaml"
    path.write_text(
        f"""
name: moods
output_dir: {path.parent / "runs"}
model: {{backbone: {BASE}, backbone_path: "{tiny_backbone("bert")}", quantization: none, precision: fp32}}
adapter: {{r: 4, license: apache-2.0}}
data: {{task: sequence, path: "{data_folder}", format: tsv, name: Made-up moods, language: [es, en], license: CC0}}
training: {{max_steps: 4, batch_size: 8}}
""",
        encoding="utf-8",
    )
    return train(Recipe.load(path), quiet=True).folder.root


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "moods"))


@pytest.fixture
def hub(tiny_backbone):
    with HubServer() as server:
        server.add_model(BASE, tiny_backbone("bert"))
        yield server


@pytest.fixture
def python(tmp_path, hub):
    """Return a function that runs Python, logged in to the stand-in unless told otherwise."""

    def call(*arguments: object, code: int = 0, **settings: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={key: value for key, value in (environment | settings).items() if value},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def push(python):
    def call(run: Path, repo: str = REPO, *options: str, **more) -> subprocess.CompletedProcess:
        return python("-m", "tokmask_peft", "push", run, repo, *options, **more)

    return call


def test_what_a_run_leaves_to_push_says_nothing_of_the_machine(finished, tiny_backbone):
    for path in (finished / "adapter").iterdir():
        for place in (finished.parent, tiny_backbone("bert"), Path.home() / ".cache", Path.cwd(), Path(sys.prefix)):
            assert str(place).encode() not in path.read_bytes(), path.name
    card = (finished / "adapter" / "README.md").read_text()
    assert f"/{getpass.getuser()}" not in card
    assert "Linux" not in card


PULL = f"""
import json, sys
sys.modules["tokmask_peft"] = None  # any use of it fails
from pathlib import Path
from huggingface_hub import snapshot_download
folder = Path(snapshot_download("{REPO}"))
card = (folder / "README.md").read_text()
exec(card.split("```python\\n")[1].split("```")[0])
print(json.dumps({{"folder": str(folder), "logits": model(**inputs).logits.tolist()}}))
"""


def test_pushed_pulled_and_used_without_this_package(run, hub, push, python, tmp_path):
    (run / "adapter" / "notes.txt").write_text("mine")
    (run / "adapter" / "checkpoint-3").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    out = push(run, HF_TOKEN="").stdout
    adapter = run / "adapter"
    sent = {path.name for path in adapter.iterdir()} - {"notes.txt", "checkpoint-3"}
    assert set(hub.repositories[REPO].files) == sent | {".gitattributes"}
    assert {"adapter_model.safetensors", "tokenizer.json", "labels.json", "confusion_matrix.png"} <= sent
    assert f"adapter_model.safetensors  {(adapter / 'adapter_model.safetensors').stat().st_size:>13,} bytes" in out
    assert all(f"  {name} " in out for name in sent)
    assert "Not pushed: checkpoint-3, notes.txt" in out
    assert out.index("labels.json") < out.index(f"{hub.url}/{REPO}")
    assert [who for _, path, who in hub.requests if path.startswith("/storage")] == [None], "storage saw the token"

    pulled = python("-c", PULL, HF_HOME=str(tmp_path / "fresh"), HF_TOKEN="").stdout.strip().splitlines()
    found = json.loads(pulled[-1])
    for name in sent:
        expected = (adapter / name).read_bytes()
        if name == "README.md":
            assert b'adapter = "PATH_OR_HUB_ID"' in expected
            expected = expected.replace(b"PATH_OR_HUB_ID", REPO.encode())
        assert (Path(found["folder"]) / name).read_bytes() == expected, name
    assert pulled[-2] in {"['negative']", "['positive']"}
    assert found["logits"][0] == pytest.approx(logits_here(run), abs=1e-5)


def logits_here(run: Path) -> list[float]:
    """Return this package's logits for the text of the card's snippet."""
    import torch

    from tokmask_peft.model.adapter import load_adapter
    from tokmask_peft.model.backbone import load_backbone
    from tokmask_peft.recipe.loading import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    backbone = load_backbone(recipe.model, "sequence", ("negative", "positive"), torch.device("cpu"))
    model = load_adapter(backbone, run / "adapter")
    with torch.no_grad():
        return model(**backbone.tokenizer(["This phone is bien bonito"], return_tensors="pt")).logits[0].tolist()


FAULTS = {
    "no login": ({"HF_TOKEN": ""}, None, REPO, ["not logged in", "hf auth login"]),
    "offline": ({"HF_HUB_OFFLINE": "1"}, None, REPO, ["HF_HUB_OFFLINE is set", "unset it"]),
    "401": ({"HF_TOKEN": "hf_old"}, None, REPO, ["does not accept your token (401)", "hf auth login", "HF_TOKEN"]),
    "403": ({}, None, "castle/moods", ["may not write to castle/moods (403)", "you are zelda and may act for castle"]),
    "404": ({}, None, "nowhere/moods", ["no user or organisation nowhere", "(404); you are zelda"]),
    "409": ({}, ("/commit/", 409), REPO, ["changed by somebody else", "(409)", "Push again"]),
    "429": ({}, ("/repos/create", 429), REPO, ["too many requests", "(429)", "Wait"]),
    "500": ({}, ("/commit/", 500), REPO, ["trouble of its own (500)", "Push again", "The Hub says: ordered by"]),
    "dropped": ({}, ("/commit/", "drop"), REPO, ["the connection to http://127.0.0.1:", "broke", "Push again"]),
    "refused": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, None, REPO, ["could not be made", "http://127.0.0.1:9"]),
    "no name": ({}, None, "moods", ["'moods' is no repository", "user/name"]),
    "bad name": ({}, None, "a/b/c", ["'a/b/c' cannot be a repository"]),
    "xet": ({"HF_HUB_DISABLE_XET": ""}, None, REPO, ["Push again"]),  # the stand-in does not speak it
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_clear_error(name, finished, hub, push):
    settings, fault, repo, expected = FAULTS[name]
    if fault:
        hub.fail(*fault)
    said = push(finished, repo, code=2, **settings).stderr
    assert said.startswith("Error: ")
    assert said.count("\n") == 1, "more than one line"
    for words in expected:
        assert words in said
    held = hub.repositories.get(REPO)
    assert held is None or held.commits == ["initial commit"]


def test_a_card_that_the_hub_cannot_read_is_named(run, hub, push):
    card = run / "adapter" / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: [apache-2.0"))
    said = push(run, code=2).stderr
    assert said.startswith("Error: the Hub cannot read the head of README.md: ")
    assert "expected ',' or ']'" in said
    assert hub.repositories[REPO].commits == ["initial commit"]


def test_no_answer_is_not_waited_for_for_ever(finished, hub, python):
    hub.fail("/repos/create", "hang")
    program = (
        "from tokmask_peft import cli; from tokmask_peft.hub import push; push.ANSWER_SECONDS = 0.5; cli.main()"
    )
    said = python("-c", program, "push", finished, REPO, code=2).stderr
    assert "gave no answer within 0.5 seconds" in said


def test_what_the_hub_says_is_cleaned_of_the_token(finished, hub, push):
    hub.fail("/commit/", 400, message=f"bad header: Bearer {TOKEN}")
    said = push(finished, code=2).stderr  # the fixture looks for the token
    assert "bad header: Bearer …" in said


def test_a_second_push_completes_and_sends_the_weights_once(finished, hub, push):
    hub.fail("PUT /storage", 500)  # once: huggingface_hub tries again by itself
    hub.fail("/commit/", "drop")
    push(finished, code=2)
    assert hub.repositories[REPO].commits == ["initial commit"]
    push(finished)
    assert hub.repositories[REPO].commits == ["initial commit", "Add the adapter"]
    assert len(hub.uploads) == 1
    assert "had all of it already" in push(finished).stdout
    assert len(hub.repositories[REPO].commits) == 2


def test_an_update_takes_away_what_no_longer_belongs_and_only_that(run, hub, push):
    (run / "adapter" / "calibration.json").write_text("{}")
    push(run)
    hub.repositories[REPO].files["examples.md"] = b"mine"
    (run / "adapter" / "calibration.json").unlink()
    labels = json.loads((run / "adapter" / "labels.json").read_text())
    (run / "adapter" / "labels.json").write_text(json.dumps(labels))
    assert "Removed there, as this run has none: calibration.json" in push(run).stdout
    held = hub.repositories[REPO].files
    assert "calibration.json" not in held
    assert held["examples.md"] == b"mine"
    assert held["labels.json"] == (run / "adapter" / "labels.json").read_bytes()


def test_private_is_private_or_nothing_goes(run, hub, push):
    push(run, REPO, "--private")
    assert hub.repositories[REPO].private
    push(run, "zelda/open")
    before = hub.repositories["zelda/open"].commits[:]
    assert not hub.repositories["zelda/open"].private
    (run / "adapter" / "calibration.json").write_text("{}")
    said = push(run, "zelda/open", "--private", code=2).stderr
    assert "exists and is public" in said
    assert hub.repositories["zelda/open"].commits == before


def test_the_python_twin_returns_the_address(finished, hub, python):
    program = f"import tokmask_peft; print(repr(tokmask_peft.push({str(finished)!r}, {REPO!r}, quiet=True)))"
    assert python("-c", program).stdout.strip() == repr(f"{hub.url}/{REPO}")


RUN_THE_CARD = f"""
import sys
sys.modules["tokmask_peft"] = sys.modules["peft"] = None  # any use of them fails
from pathlib import Path
from huggingface_hub import hf_hub_download
exec(Path(hf_hub_download("{REPO}", "README.md")).read_text().split("```python\\n")[1].split("```")[0])
"""


def test_the_merged_model_is_pushed_pulled_and_run_by_its_card(finished, hub, push, python, tmp_path):
    out = push(finished, REPO, "--merged").stdout
    held = hub.repositories[REPO]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(held.files)
    assert "adapter_config.json" not in held.files
    assert held.commits[-1] == "Add the merged model"
    assert "the merged model of moods" in out
    assert f"{len(held.files['model.safetensors']):,} bytes" in out
    for name in ("config.json", "README.md"):
        assert str(finished.parent).encode() not in held.files[name]
    head = held.files["README.md"].decode().split("---")[1]
    for line in ("library_name: transformers", "base_model_relation: finetune", f"base_model: {BASE}"):
        assert line in head
    fresh = {"HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": ""}
    said = python("-c", RUN_THE_CARD, **fresh).stdout
    (expected,) = load(finished).predict(["This phone is bien bonito"])
    (found,) = ast.literal_eval(said.strip().splitlines()[-1])
    assert found["label"] == expected.label
    assert any(method == "HEAD" and path.endswith("/model.safetensors") for method, path, _ in hub.requests)
    both = push(finished, REPO, code=2).stderr
    assert "holds a whole model (config.json)" in both
    assert "adapter_config.json" not in hub.repositories[REPO].files


def test_a_pushed_adapter_is_loaded_by_its_id_and_predicts(finished, hub, push, python, tmp_path):
    push(finished)
    program = f"""
import tokmask_peft
classifier = tokmask_peft.load("{REPO}")
(answer,) = classifier.predict(["hoy great phone"])
(explanation,) = classifier.explain(["hoy great phone"])
print(repr((answer.label, answer.probabilities, explanation.influences, classifier.occlusion.trained)))
"""
    fresh = {"HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": ""}
    label, probabilities, influences, trained = ast.literal_eval(python("-c", program, **fresh).stdout.splitlines()[-1])
    here = load(finished)
    (answer,), (explanation,) = here.predict(["hoy great phone"]), here.explain(["hoy great phone"])
    assert label == answer.label
    assert probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    assert influences == pytest.approx(explanation.influences, abs=1e-4)
    assert trained
    assert (tmp_path / "fresh" / "hub" / f"models--{REPO.replace('/', '--')}").is_dir()
    fetched = {path.rsplit("/", 1)[1] for _, path, _ in hub.requests if "/resolve/" in path and f"/{REPO}/" in path}
    assert {"adapter_model.safetensors", "calibration.json", "tokmask_config.json"} <= fetched
