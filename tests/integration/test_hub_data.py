"""Datasets on the Hub, against a stand-in on loopback: no Hub can be reached in the tests.

huggingface_hub reads its endpoint when it is imported, so every case runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_http import Transport

REPO = "someone/switched"
GATED = "someone/closed"
SCRIPTED = "someone/scripted"
REVISION = "refs/convert/parquet"
SHA = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """Serves the files of a folder as revision refs/convert/parquet of `REPO`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(Transport):
    server: StandIn

    def _any(self) -> None:
        url = urlparse(self.path)
        path, body = unquote(url.path), self.read()
        if f"/datasets/{GATED}" in path:
            self.error(403, "access is restricted", "GatedRepo")
        elif f"/datasets/{SCRIPTED}" in path:
            self._scripted(path)
        elif path.startswith(f"/api/datasets/{REPO}"):
            self._api(path.removeprefix(f"/api/datasets/{REPO}"), parse_qs(url.query), body)
        elif path.startswith(f"/datasets/{REPO}/resolve/"):
            self._file(path.removeprefix(f"/datasets/{REPO}/resolve/"))
        else:
            self.error(404, "", "RepoNotFound")

    do_GET = do_HEAD = do_POST = _any  # noqa: N815

    def _api(self, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        entries = [self._entry(path) for path in sorted(self.server.folder.rglob("*"))]
        if rest in ("", f"/revision/{REVISION}", f"/revision/{SHA}"):
            self._about(REPO, [entry["path"] for entry in entries if entry["type"] == "file"])
            return
        what, _, where = rest.removeprefix("/").partition("/")
        revision = next((one for one in (REVISION, SHA) if where == one or where.startswith(f"{one}/")), None)
        root = self.server.folder / where.removeprefix(revision or "").strip("/")
        if revision and what == "tree" and root.is_dir():
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            self.json([self._entry(path) for path in sorted(root.rglob("*") if recursive else root.iterdir())])
        elif revision and what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            self.json([entry for entry in entries if entry["path"] in asked])
        else:
            self.error(404, "", "EntryNotFound" if revision else "RevisionNotFound")

    def _about(self, repo: str, files: list[object]) -> None:
        siblings = [{"rfilename": name} for name in files]
        self.json({"id": repo, "sha": SHA, "private": False, "gated": False, "tags": [], "siblings": siblings})

    def _entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.server.folder).as_posix()
        oid, kind = hashlib.sha1(name.encode()).hexdigest(), "directory" if path.is_dir() else "file"
        return {"type": kind, "oid": oid, "size": 0 if path.is_dir() else path.stat().st_size, "path": name}

    def _file(self, rest: str) -> None:
        revision = next((one for one in (REVISION, SHA) if rest.startswith(f"{one}/")), None)
        path = self.server.folder / rest.removeprefix(f"{revision}/")
        if revision is None or not path.is_file():
            self.error(404, "", "EntryNotFound" if revision else "RevisionNotFound", {"X-Repo-Commit": SHA})
            return
        data = path.read_bytes()
        headers, status = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA}, 200
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = int(last) + 1 if last else len(data)
            headers |= {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
            data, status = data[int(first) : stop], 206
        self.send(status, data, headers)

    def _scripted(self, path: str) -> None:
        """A dataset that comes with code."""
        if path.endswith("/scripted.py"):
            self.send(200, b"raise SystemExit", {"ETag": '"code"', "X-Repo-Commit": SHA})
        elif "/resolve/" in path:
            self.error(404, "", "EntryNotFound", {"X-Repo-Commit": SHA})
        else:
            self._about(SCRIPTED, [])


def write_dataset(root: Path) -> None:
    """Write made-up posts as the Hub's parquet branch holds LinCE: a folder per configuration, no card."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    words = [["hola", "my", "friend", f"#{n}"] for n in range(12)]
    tags = [["lang2", "lang1", "lang1", "other"]] * 12
    for config, extra in {"lid_someeng": {}, "sa_someeng": {"sa": ["positive", "negative"] * 6}}.items():
        for split, size in {"train": 12, "validation": 4, "test": 3}.items():
            columns = {"idx": list(range(size)), "words": words[:size], "lid": tags[:size]}
            columns |= {name: values[:size] for name, values in extra.items()}
            if split == "test":
                columns |= {"lid": [[""] * 4] * size} | {name: [""] * size for name in extra}
            (root / config / split).mkdir(parents=True)
            pq.write_table(pa.table(columns), root / config / split / "0000.parquet")
    features = Features({"words": List(Value("string")), "lid": List(Value("string")),
                         "pos": List(ClassLabel(names=["INTJ", "DET", "NOUN", "X"]))})  # fmt: skip
    for split in ("train", "validation"):
        rows = {"words": words[:3], "lid": tags[:3], "pos": [[0, 1, 2, 3]] * 3}
        (root / "pos_someeng" / split).mkdir(parents=True)
        Dataset.from_dict(rows, features=features).to_parquet(root / "pos_someeng" / split / "0000.parquet")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_dataset(root)
    with StandIn(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs code in a process; it prints one JSON object, or the error that it raised."""

    def call(code: str, home: Path, **settings: str) -> dict[str, object]:
        program = (
            "import json\n"
            "from tokmask_peft.data import load_corpus\n"
            "from tokmask_peft.data.readers import read_split\n"
            "from tokmask_peft.errors import DataError\n"
            "from tokmask_peft.recipe import DataConfig, SourceConfig\n"
            f"HUB = {{'hub': '{REPO}', 'hub_revision': '{REVISION}'}}\n"
            "try:\n" + textwrap.indent(textwrap.dedent(code).strip(), "    ") + "\n"
            "except DataError as error:\n"
            "    print(json.dumps({'error': str(error)}))\n"
        )
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings
        environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        folder = tmp_path_factory.mktemp("said")
        done = forked.Python.start(["-c", program], folder, environment, folder).end(timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    return call


def test_language_tags_by_the_configurations_prefix(run, hub, home):
    found = run(
        """
        config = DataConfig(**HUB, hub_config="lid_someeng", task="token", test=None, hygiene="report")
        corpus = load_corpus(config, seed=1)
        print(json.dumps({"train": len(corpus.train), "validation": len(corpus.validation), "labels": corpus.labels,
                          "first": corpus.train[0].text, "tags": corpus.train[0].label, "where": corpus.train[0].where,
                          "lines": corpus.report.lines()}))
        """,
        home,
        HF_ENDPOINT=hub.url,
    )
    assert (found["train"], found["validation"]) == (12, 4)
    assert found["labels"] == ["lang1", "lang2", "other"]
    assert found["first"] == ["hola", "my", "friend", "#0"]
    assert found["tags"] == ["lang2", "lang1", "lang1", "other"]
    assert found["where"] == f"{REPO} train[0]"
    assert f"{REPO} lid_someeng {REVISION} [train]" in found["lines"][0]


def test_sentiment_of_joined_words_and_numbered_classes(run, hub, home):
    found = run(
        """
        sentiment = read_split(SourceConfig(**HUB, hub_config="sa_someeng"), "dev", "sequence")
        pos = read_split(SourceConfig(**HUB, hub_config="pos_someeng"), "train", "token")
        lid = read_split(SourceConfig(**HUB, hub_config="pos_someeng", label_column="lid"), "train", "token")
        print(json.dumps({"text": sentiment[1].text, "label": sentiment[1].label, "pos": pos[0].label,
                          "lid": lid[0].label}))
        """,
        home,
        HF_ENDPOINT=hub.url,
    )
    assert (found["text"], found["label"]) == ("hola my friend #1", "negative")
    assert found["pos"] == ["INTJ", "DET", "NOUN", "X"]
    assert found["lid"] == ["lang2", "lang1", "lang1", "other"]


LID = "hub_config='lid_someeng', task='token'"
BRANCH = f"hub_config='x', hub_revision='{REVISION}'"
MISTAKES = {
    "unlabelled": (
        f"load_corpus(DataConfig(**HUB, {LID}), seed=1)",
        ["no text has a label", "data.test to validation", "share of train such as 0.1"],
    ),
    "same": (
        f"load_corpus(DataConfig(**HUB, {LID}, test='dev'), seed=1)",
        ["data.validation and data.test are the same texts"],
    ),
    "split": (
        "read_split(SourceConfig(**HUB, hub_config='pos_someeng'), 'test', 'token')",
        ["no split 'test'", "train, validation"],
    ),
    "configuration": (
        "read_split(SourceConfig(**HUB, hub_config='lid_nowhere'), 'train', 'token')",
        ["data.hub_config", "'lid_nowhere'", "It has lid_someeng, pos_someeng, sa_someeng. Did you mean 'lid_"],
    ),
    "missing": (
        "read_split(SourceConfig(hub='someone/nothing'), 'train', 'token')",
        ["someone/nothing", "data.hub", "hf auth login"],
    ),
    "missing branch": (
        f"read_split(SourceConfig(hub='someone/nothing', {BRANCH}), 'train', 'token')",
        ["someone/nothing", "data.hub", "hf auth login"],
    ),
    "gated": (
        f"read_split(SourceConfig(hub='{GATED}'), 'train', 'token')",
        [GATED, "gated", "Ask for access", "hf auth login"],
    ),
    "gated branch": (
        f"read_split(SourceConfig(hub='{GATED}', {BRANCH}), 'train', 'token')",
        [GATED, "Ask for access", "hf auth login"],
    ),
    "script": (
        f"read_split(SourceConfig(hub='{SCRIPTED}'), 'train', 'token')",
        [SCRIPTED, "never run here", f"data.hub_revision to {REVISION}"],
    ),
}


@pytest.fixture(scope="module")
def errors(run, hub, home):
    cases = {name: code for name, (code, _) in MISTAKES.items()}
    code = f"""
        found = {{}}
        for name, case in {cases!r}.items():
            try:
                eval(case)
            except DataError as error:
                found[name] = str(error)
        print(json.dumps(found))
    """
    return run(code, home, HF_ENDPOINT=hub.url)


@pytest.mark.parametrize("name", MISTAKES)
def test_one_error_with_its_remedy(errors, name):
    for message in MISTAKES[name][1]:
        assert message in errors[name]


def test_offline_names_the_way_out(run, tmp_path):
    code = 'read_split(SourceConfig(**HUB, hub_config="lid_someeng"), "train", "token")'
    error = run(code, tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert "cannot be reached" in error
    assert "data.path" in error


def test_what_was_loaded_once_is_there_offline(run, hub, home):
    code = """
        found = read_split(SourceConfig(**HUB, hub_config="lid_someeng"), "train", "token")
        print(json.dumps({"texts": len(found), "words": found[0].text}))
    """
    online = run(code, home, HF_ENDPOINT=hub.url)
    assert online == run(code, home, HF_HUB_OFFLINE="1")
    other = 'read_split(SourceConfig(**HUB, hub_config="lid_nowhere"), "train", "token")'
    assert "no parquet files for 'lid_nowhere'" in run(other, home, HF_HUB_OFFLINE="1")["error"]
