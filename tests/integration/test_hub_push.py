"""Pushing to the Hub, against a stand-in on loopback: there and back byte by byte, and every fault.

huggingface_hub reads its settings when it is imported, so every push runs in a process of its own (`begin`).
"""

import ast
import getpass
import json
import os
import shutil
import sys
from pathlib import Path

import forked
import pytest
from hub_server import TOKEN, HubServer

from tokmask_peft import load, train
from tokmask_peft.recipe.schema import Recipe

REPO = "zelda/moods"
BASE = "castle/tiny-bert"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_folder, tiny_backbone) -> Path:
    """A run whose backbone has an id on the Hub, although it was loaded from a folder."""
    path = tmp_path_factory.mktemp("push") / "recipe.yaml"
    path.write_text(
        f"""
name: moods
output_dir: {path.parent / "runs"}
model: {{backbone: {BASE}, backbone_path: "{tiny_backbone("bert")}", quantization: none, precision: fp32}}
adapter: {{r: 4, license: apache-2.0}}
data: {{task: sequence, path: "{data_folder}", format: tsv, max_length: 62,
  name: Made-up moods, language: [es, en], license: CC0}}
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
def python(tmp_path, hub, begin):
    """Return a function that runs Python, by default logged in to the stand-in; its output must hold no token."""

    def call(*arguments: object, code: int = 0, **settings: str) -> forked.Finished:
        hub_settings = dict.fromkeys((name for name in os.environ if name.startswith("HF_")), "")
        hub_settings |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        hub_settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        done = begin(*arguments, **hub_settings | settings).end(timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def push(python):
    def call(run: Path, repo: str = REPO, *options: str, **more) -> forked.Finished:
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
    assert {"adapter_model.safetensors", "tokenizer.json", "tokmask.json", "confusion_matrix.png"} <= sent
    assert f"adapter_model.safetensors  {(adapter / 'adapter_model.safetensors').stat().st_size:>13,} bytes" in out
    assert all(f"  {name} " in out for name in sent)
    assert "Not pushed: checkpoint-3, notes.txt" in out
    assert out.index("tokmask.json") < out.index(f"{hub.url}/{REPO}")
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


PUSH = """
import sys, warnings
warnings.simplefilter("ignore")
from tokmask_peft.errors import HubError
from tokmask_peft.hub import push
push.ANSWER_SECONDS = 0.5
try:
    push.push_adapter(*sys.argv[1:])
except HubError as error:
    print(error.code, error.fields.get("status"), error, sep="\\n")
"""

FAULTS = {
    "401": ({"HF_TOKEN": "hf_old"}, None, REPO, "token-refused", 401, "hf auth login"),
    "403": ({}, None, "castle/moods", "no-write-access", 403, "you are zelda and may act for castle"),
    "404": ({}, None, "nowhere/moods", "unknown-owner", 404, "nowhere"),
    "412": ({}, ("/commit/", 412), REPO, "conflict", 412, "Push again"),
    "429": ({}, ("/repos/create", 429), REPO, "rate-limit", 429, "Wait"),
    "503": ({}, ("/commit/", 503, 9), REPO, "hub-failed", 503, "The Hub says: ordered by the test"),
    "400": ({}, ("/commit/", 400, 1, f"Bearer {TOKEN}"), REPO, "push-refused", 400, "The Hub says: Bearer …"),
    "dropped": ({}, ("/commit/", "drop"), REPO, "no-connection", None, "Push again"),
    "refused": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, None, REPO, "no-connection", None, "http://127.0.0.1:9"),
    "hangs": ({}, ("/repos/create", "hang"), REPO, "no-answer", None, "within 0.5 seconds"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_code_and_remedy(name, finished, hub, python):
    settings, fault, repo, code, status, remedy = FAULTS[name]
    if fault:
        hub.fail(*fault)
    found = python("-c", PUSH, finished, repo, **settings).stdout.strip().splitlines()
    assert found[-3:-1] == [code, str(status)]
    assert remedy in found[-1]
    there = hub.repositories.get(REPO)
    assert there is None or there.commits == ["initial commit"]


def test_the_command_ends_with_one_line(finished, push):
    message = push(finished, code=2, HF_TOKEN="").stderr
    assert message.startswith("Error: ")
    assert "hf auth login" in message
    assert message.count("\n") == 1


def test_a_card_that_the_hub_cannot_read_is_named(run, hub, python):
    card = run / "adapter" / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: [apache-2.0"))
    *_, code, _, message = python("-c", PUSH, run, REPO).stdout.strip().splitlines()
    assert code == "bad-card"
    assert "README.md" in message
    assert "expected ',' or ']'" in message
    assert hub.repositories[REPO].commits == ["initial commit"]


def test_a_second_push_completes_and_sends_the_weights_once(finished, hub, push):
    hub.fail("PUT /storage", 500)  # once: huggingface_hub tries again by itself
    hub.fail("/commit/", "drop")
    push(finished, code=2)
    assert hub.repositories[REPO].commits == ["initial commit"]
    push(finished)
    assert hub.repositories[REPO].commits == ["initial commit", "Add the adapter"]
    assert len(hub.uploads) == 1
    assert "up to date already" in push(finished).stdout
    assert len(hub.repositories[REPO].commits) == 2


def test_an_update_takes_away_what_no_longer_belongs_and_only_that(run, hub, push):
    (run / "adapter" / "calibration.json").write_text("{}")
    push(run)
    hub.repositories[REPO].files["examples.md"] = b"mine"
    (run / "adapter" / "calibration.json").unlink()
    facts = json.loads((run / "adapter" / "tokmask.json").read_text())
    (run / "adapter" / "tokmask.json").write_text(json.dumps(facts))
    (line,) = [line for line in push(run).stdout.splitlines() if line.startswith("Removed from the repository")]
    assert line.endswith(": calibration.json")
    stored = hub.repositories[REPO].files
    assert "calibration.json" not in stored
    assert stored["examples.md"] == b"mine"
    assert stored["tokmask.json"] == (run / "adapter" / "tokmask.json").read_bytes()


def test_private_is_private_or_nothing_goes(run, hub, push):
    push(run, REPO, "--private")
    assert hub.repositories[REPO].private
    push(run, "zelda/open")
    before = hub.repositories["zelda/open"].commits[:]
    assert not hub.repositories["zelda/open"].private
    (run / "adapter" / "calibration.json").write_text("{}")
    assert "--private" in push(run, "zelda/open", "--private", code=2).stderr
    assert hub.repositories["zelda/open"].commits == before


def test_python_pushes_too_and_returns_the_address(finished, hub, python):
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
    stored = hub.repositories[REPO]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(stored.files)
    assert "adapter_config.json" not in stored.files
    assert stored.commits[-1] == "Add the merged model"
    assert "the merged model of moods" in out
    assert f"{len(stored.files['model.safetensors']):,} bytes" in out
    for name in ("config.json", "README.md"):
        assert str(finished.parent).encode() not in stored.files[name]
    head = stored.files["README.md"].decode().split("---")[1]
    for line in ("library_name: transformers", "base_model_relation: finetune", f"base_model: {BASE}"):
        assert line in head
    fresh = {"HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": ""}
    said = python("-c", RUN_THE_CARD, **fresh).stdout
    (expected,) = load(finished).predict(["This phone is bien bonito"])
    (found,) = ast.literal_eval(said.strip().splitlines()[-1])
    assert found["label"] == expected.label
    assert any(method == "HEAD" and path.endswith("/model.safetensors") for method, path, _ in hub.requests)
    assert "(config.json)" in push(finished, REPO, code=2).stderr
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
    assert {"adapter_model.safetensors", "tokmask.json"} <= fetched
