"""What is refused before anything is sent; no Hub is needed for that."""

import json
from pathlib import Path

import pytest

from tokmask_peft.artifacts import RunFolder
from tokmask_peft.errors import HubError, RunError
from tokmask_peft.hub import push as pushing
from tokmask_peft.hub.push import push_adapter, push_model

TOKEN = "hf_0123456789abcdef"
CARD = '---\nlibrary_name: peft\n---\nadapter = "PATH_OR_HUB_ID"\n'


@pytest.fixture
def sent(monkeypatch):
    """What would be sent, by name."""
    files = {}

    def send(folder, *_):
        files.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return "there"

    monkeypatch.setattr(pushing, "_send", send)
    return files


@pytest.fixture
def run(tmp_path, monkeypatch, sent):
    """The outline of a finished run, with nothing that could be reached outside."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    root = tmp_path / "run"
    (root / "adapter").mkdir(parents=True)
    (root / "recipe.yaml").write_text("name: run\n")
    (root / "result.json").write_text("{}")
    (root / "adapter" / "README.md").write_text(CARD)
    (root / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "castle/bert"}))
    return root


@pytest.fixture
def refused(run, sent):
    def push(code, error=HubError, repo="zelda/moods", **fields):
        with pytest.raises(error) as caught:
            push_adapter(run, repo, quiet=True)
        assert caught.value.code == code
        assert fields.items() <= caught.value.fields.items()
        assert TOKEN not in str(caught.value)
        assert not sent
        return str(caught.value)

    return push


def test_only_what_belongs_is_sent_and_the_card_gets_the_id(run, sent, capsys):
    more = ("tokmask.json", "labels.json", "optimizer.pt", ".env", "training_args.bin", "other.safetensors", "a.png")
    for name in more:
        (run / "adapter" / name).write_text("x")
    assert push_adapter(run, "zelda/moods") == "there"
    needed = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(sent) == needed | {"tokmask.json", "labels.json"}
    assert sent["README.md"] == CARD.replace("PATH_OR_HUB_ID", "zelda/moods").encode()
    assert (run / "adapter" / "README.md").read_text() == CARD, "the run itself must not change"
    assert "Not pushed: .env, a.png, optimizer.pt, other.safetensors, training_args.bin" in capsys.readouterr().out


def test_a_merged_model_is_sent_whole(run, sent, tmp_path, capsys):
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(CARD)
    assert push_model(folder, RunFolder(run), "zelda/moods", notes=["one thing"]) == "there"
    assert set(sent) == {"config.json", "model.safetensors", "README.md"}
    assert b"zelda/moods" in sent["README.md"]
    assert "Note: one thing." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokmask.json", "README.md"])
def test_a_link_is_refused_although_its_name_belongs(run, refused, tmp_path, name):
    (tmp_path / "secret").write_text("private")
    (run / "adapter" / name).unlink(missing_ok=True)
    (run / "adapter" / name).symlink_to(tmp_path / "secret")
    refused("link", files=[name])


def test_a_linked_folder_and_a_token_in_a_file_are_refused(run, refused):
    (run / "adapter" / "README.md").write_text(f"{CARD}\nmine is {TOKEN}")
    refused("token-in-file", files=["README.md"])
    (run / "adapter").rename(run / "elsewhere")
    (run / "adapter").symlink_to(run / "elsewhere")
    refused("link")


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors"])
def test_an_incomplete_adapter_is_refused(run, refused, name):
    (run / "adapter" / name).unlink()
    refused("incomplete-adapter", missing=[name])


@pytest.mark.parametrize(
    "base", ["/home/zelda/bert", "./bert", "../models/bert", "~/bert", "C:\\models\\bert", "", None, "castle/bert"]
)
def test_a_backbone_that_only_this_machine_has_is_refused(run, refused, tmp_path, monkeypatch, base):
    Path(tmp_path / "castle" / "bert").mkdir(parents=True)  # looks like an id
    monkeypatch.chdir(tmp_path)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert "model.backbone" in refused("local-backbone", backbone=base)


def test_a_run_without_a_result_is_refused(run, refused):
    (run / "result.json").unlink()
    assert "--resume" in refused("unfinished", RunError)


@pytest.mark.parametrize("repo", ["moods", "a/b/c"])
def test_what_is_not_a_repository_is_refused(refused, repo):
    assert repr(repo) in refused("bad-repo", repo=repo)


def test_without_a_login_or_the_network_nothing_is_listed(refused, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in refused("not-logged-in")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # TRANSFORMERS_OFFLINE sets it, too
    assert "unset it" in refused("offline")
    assert capsys.readouterr().out == ""
