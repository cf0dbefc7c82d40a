"""What is refused before anything is sent: no Hub is needed to say so."""

import json

import pytest

from tokmask_peft.errors import HubError, RunError
from tokmask_peft.hub import push as pushing
from tokmask_peft.hub.push import files_to_push
from tokmask_peft.hub.push import push_adapter as push

TOKEN = "hf_0123456789abcdef"
CARD = '---\nlibrary_name: peft\n---\nadapter = "PATH_OR_HUB_ID"\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The outline of a finished run, with nothing that could be reached outside."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(pushing, "send", lambda *_: pytest.fail("something was sent"))
    root = tmp_path / "run"
    (root / "adapter").mkdir(parents=True)
    (root / "recipe.yaml").write_text("name: run\n")
    (root / "result.json").write_text("{}")
    (root / "adapter" / "README.md").write_text(CARD)
    (root / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "castle/bert"}))
    return root


def refused(run, *words, error=HubError, repo="zelda/moods"):
    with pytest.raises(error) as caught:
        push(run, repo, quiet=True)
    for word in words:
        assert word in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_the_outline_itself_is_sent(run, monkeypatch):
    sent = []
    monkeypatch.setattr(pushing, "send", lambda files, *_: sent.extend(files) or "there")
    assert push(run, "zelda/moods", quiet=True) == "there"
    assert [file.name for file in sent] == ["adapter_config.json", "adapter_model.safetensors", "README.md"]


def test_only_what_belongs_is_listed_and_the_card_gets_the_id(run):
    for name in ("labels.json", "optimizer.pt", ".env", "training_args.bin", "other.safetensors", "photo.png"):
        (run / "adapter" / name).write_text("x")
    files, stay = files_to_push(run / "adapter", "zelda/moods")
    assert {file.name for file in files} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
    }
    assert stay == [".env", "optimizer.pt", "other.safetensors", "photo.png", "training_args.bin"]
    card = next(file for file in files if file.name == "README.md")
    assert card.content == CARD.replace("PATH_OR_HUB_ID", "zelda/moods").encode()
    assert card.size == len(card.content)
    assert "PATH_OR_HUB_ID" in (run / "adapter" / "README.md").read_text(), "the run itself must not change"


@pytest.mark.parametrize("name", ["labels.json", "README.md"])
def test_a_link_is_refused_though_it_has_a_name_that_belongs(run, tmp_path, name):
    (tmp_path / "secret").write_text("private")
    (run / "adapter" / name).unlink(missing_ok=True)
    (run / "adapter" / name).symlink_to(tmp_path / "secret")
    refused(run, name, "links")


def test_a_linked_folder_is_refused(run):
    (run / "adapter").rename(run / "elsewhere")
    (run / "adapter").symlink_to(run / "elsewhere")
    refused(run, "is a link")


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(run, name):
    (run / "adapter" / name).unlink()
    refused(run, name, "missing")


@pytest.mark.parametrize(
    "base", ["/home/zelda/bert", "./bert", "../models/bert", "~/bert", "C:\\models\\bert", "", None]
)
def test_a_backbone_that_only_this_machine_has_is_refused(run, base):
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    refused(run, repr(base), "model.backbone", "Hub id")


def test_a_folder_that_looks_like_an_id_is_refused_where_it_exists(run, tmp_path, monkeypatch):
    (tmp_path / "castle" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refused(run, "'castle/bert'", "model.backbone")


def test_a_token_in_a_file_is_refused(run):
    (run / "adapter" / "README.md").write_text(f"{CARD}\nmine is {TOKEN}")
    refused(run, "README.md holds your Hub token")


def test_a_run_without_a_result_is_refused(run):
    (run / "result.json").unlink()
    refused(run, "no result yet", "--resume", error=RunError)


def test_without_a_login_nothing_is_listed(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        push(run, "zelda/moods")
    assert capsys.readouterr().out == ""
