"""Datasets on the Hub, against a stand-in on loopback: no Hub can be reached in the tests.

huggingface_hub reads its endpoint when it is imported, so every case runs in a process of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import textwrap
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_texts
from hub_http import Transport

from tokmask_peft.data.hub import _reach
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import SourceConfig

REPO = "someone/switched"
FEELINGS, MOODS, TONES = "someone/feelings", "someone/moods", "someone/tones"
DAMAGED, GATED = "someone/damaged", "someone/closed"
SCRIPTED = "someone/scripted"
REVISION = "refs/convert/parquet"
SHA = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = (REVISION, SHA, "main")


class StandIn(ThreadingHTTPServer):
    """Serves the folders `owner/name` of a folder as datasets: main, refs/convert/parquet and a commit are the same."""

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
        found = re.match(r"/(api/)?datasets/([\w-]+/[\w-]+)/?(.*)", path)
        self.repo = found[2] if found else ""
        self.root = self.server.folder / self.repo
        if self.repo == GATED:
            self.error(403, "access is restricted", "GatedRepo")
        elif path.endswith("/scripted.py") and self.repo == SCRIPTED:
            self.send(200, b"raise SystemExit", {"ETag": '"code"', "X-Repo-Commit": SHA})
        elif not found or not self.root.is_dir():
            self.error(404, "", "RepoNotFound")
        elif found[1]:
            self._api(found[3], parse_qs(url.query), body)
        else:
            self._file(found[3].removeprefix("resolve/"))

    do_GET = do_HEAD = do_POST = _any  # noqa: N815

    def _api(self, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        entries = [self._entry(path) for path in sorted(self.root.rglob("*"))]
        if rest in ("", *(f"revision/{one}" for one in REVISIONS)):
            siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
            about = {"id": self.repo, "sha": SHA, "private": False, "gated": False, "tags": [], "siblings": siblings}
            self.json(about)
            return
        what, _, where = rest.partition("/")
        revision = next((one for one in REVISIONS if where == one or where.startswith(f"{one}/")), None)
        root = self.root / where.removeprefix(revision or "").strip("/")
        if revision and what == "tree" and root.is_dir():
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            self.json([self._entry(path) for path in sorted(root.rglob("*") if recursive else root.iterdir())])
        elif revision and what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            self.json([entry for entry in entries if entry["path"] in asked])
        else:
            self.error(404, "", "EntryNotFound" if revision else "RevisionNotFound")

    def _entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.root).as_posix()
        oid, kind = hashlib.sha1(name.encode()).hexdigest(), "directory" if path.is_dir() else "file"
        return {"type": kind, "oid": oid, "size": 0 if path.is_dir() else path.stat().st_size, "path": name}

    def _file(self, rest: str) -> None:
        revision = next((one for one in REVISIONS if rest.startswith(f"{one}/")), None)
        path = self.root / rest.removeprefix(f"{revision}/")
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
    (root / "pos_someeng" / "spare").mkdir()
    (root / "pos_someeng" / "spare" / "0000.parquet").write_bytes(b"damaged")


def write_posts(root: Path, configs: list[str], default: str | None = None) -> None:
    """Write made-up posts with numbered classes, whose test set has no labels."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["negative", "neutral", "positive"]
    features = Features({"id": Value("int64"), "post": Value("string"), "feeling": ClassLabel(names=names)})
    sizes = {"train": 60, "dev": 15, "test": 9}
    files = {one: [{"split": split, "path": f"{one}/{split}-*"} for split in sizes] for one in configs}
    card = [
        {"config_name": config, "data_files": found, "default": config == default} for config, found in files.items()
    ]
    for config in configs:
        for at, (split, size) in enumerate(sizes.items()):
            texts = make_texts(size, at + 1)
            labels = [-1 if split == "test" else names.index(label) for _, label in texts]
            rows = {"id": range(size), "post": [" ".join(words) for words, _ in texts], "feeling": labels}
            Dataset.from_dict(rows, features=features).to_parquet(root / config / f"{split}-00000-of-00001.parquet")
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\nPosts.\n", encoding="utf-8")


def write_pairs(root: Path) -> None:
    """Write made-up pairs as facebook/xnli has them: a configuration for each language, classes with names."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["entailment", "neutral", "contradiction"]
    features = Features(
        {key: Value("string") for key in ("premise", "hypothesis")} | {"label": ClassLabel(names=names)}
    )
    splits, card = {"train": 30, "test": 9, "validation": 6}, []
    for config in ("en", "sw"):
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        card.append({"config_name": config, "data_files": files})
        for split, size in splits.items():
            texts = {key: [f"{key} {split} {n} ya {config}" for n in range(size)] for key in ("premise", "hypothesis")}
            rows = Dataset.from_dict(texts | {"label": [n % 3 for n in range(size)]}, features=features)
            rows.to_parquet(root / config / f"{split}-00000-of-00001.parquet")
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\nPairs.\n", encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_dataset(root / REPO)
    (root / SCRIPTED).symlink_to(root / REPO)
    write_posts(root / FEELINGS, ["default"])
    write_posts(root / DAMAGED, ["default"])
    (root / DAMAGED / "default" / "test-00000-of-00001.parquet").write_bytes(b"damaged")
    write_posts(root / MOODS, ["calm", "loud"])
    write_posts(root / TONES, ["calm", "loud"], default="loud")
    write_pairs(root / "facebook" / "xnli")
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
            "from tokmask_peft.cli import app, start\n"
            "from typer.testing import CliRunner\n"
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


def test_the_recipe_of_pairs_finds_its_columns_classes_and_splits(run, hub, home):
    found = run(
        """
        from tokmask_peft.recipe.loading import load_recipe
        corpus = load_corpus(load_recipe("xnli_swa/e5-small", ["data.hygiene=report"]).data, seed=1)
        test = corpus.test
        print(json.dumps({"sizes": [len(part) for part in (corpus.train, corpus.validation, test)],
                          "labels": sorted(corpus.labels), "first": list(test[0].text), "label": test[0].label}))
        """,
        home,
        HF_ENDPOINT=hub.url,
    )
    assert found == {
        "sizes": [30, 6, 9],
        "labels": ["contradiction", "entailment", "neutral"],
        "first": ["premise test 0 ya sw", "hypothesis test 0 ya sw"],
        "label": "entailment",
    }


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
    "damaged": (
        "read_split(SourceConfig(**HUB, hub_config='pos_someeng'), 'spare', 'token')",
        [f"{REPO} spare", "cannot be read as parquet"],
    ),
    "damaged shard": (
        f"read_split(SourceConfig(hub='{DAMAGED}'), 'train', 'token')",
        [DAMAGED, "Could not open Parquet"],
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


def test_a_full_disk_is_not_blamed_on_the_dataset():
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="free some space") as caught:
        _reach(SourceConfig(hub="a/b"), full)
    assert (caught.value.code, caught.value.fields) == ("no-space", {"hub": "a/b"})


def test_offline_names_the_way_out(run, tmp_path):
    code = 'read_split(SourceConfig(**HUB, hub_config="lid_someeng"), "train", "token")'
    error = run(code, tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert "cannot be reached" in error
    assert "data.path" in error


@pytest.mark.parametrize(("cached", "code"), [("loud", "hub-unreachable"), ("loud calm", "no-config")])
def test_other_configurations_in_the_cache_are_not_taken(tmp_path, cached, code):
    from datasets.packaged_modules.cache.cache import Cache

    for config in cached.split():
        (folder := tmp_path / "someone___moods" / config / "0.0.0" / SHA).mkdir(parents=True)
        (folder / "dataset_info.json").write_text(json.dumps({"config_name": config}))
    wanted = "mild" if code == "hub-unreachable" else None
    kept = {"cache_dir": str(tmp_path), "config_name": wanted, "version": "auto", "hash": "auto"}
    with pytest.raises(DataError) as caught:
        _reach(SourceConfig(hub=MOODS), lambda: Cache(repo_id=MOODS, **kept))
    assert caught.value.code == code


def test_what_was_loaded_once_is_there_offline(run, hub, home):
    code = """
        found = read_split(SourceConfig(**HUB, hub_config="lid_someeng"), "train", "token")
        print(json.dumps({"texts": len(found), "words": found[0].text}))
    """
    online = run(code, home, HF_ENDPOINT=hub.url)
    assert online == run(code, home, HF_HUB_OFFLINE="1")
    other = 'read_split(SourceConfig(**HUB, hub_config="lid_nowhere"), "train", "token")'
    assert "no parquet files for 'lid_nowhere'" in run(other, home, HF_HUB_OFFLINE="1")["error"]


QUICK = ["training.max_steps=4", "training.batch_size=8", "training.baseline=false", "model.quantization=none"]


def test_a_recipe_that_init_writes_for_an_id_is_pinned_and_trains(run, hub, home, tiny_backbone, tmp_path):
    backbone, keys = str(tiny_backbone("bert")), ["data.max_length=62", *QUICK]
    options = ["--backbone", backbone, *keys, "--yes"]
    found = run(
        f"""
        import os, yaml
        os.chdir({str(tmp_path)!r})
        done = CliRunner().invoke(app, ["init", {FEELINGS!r}, *{options!r}])
        assert done.exit_code == 0, done.output
        recipe = yaml.safe_load(open("feelings.yaml"))
        trained = CliRunner().invoke(app, ["train", "feelings.yaml", "--quiet"])
        assert trained.exit_code == 0, trained.output
        direct = CliRunner().invoke(app, ["train", {FEELINGS!r}, "model.backbone={backbone}", "name=direct", *{keys!r}])
        assert direct.exit_code == 0, direct.output
        result, other = (json.load(open(f"runs/{{name}}/result.json")) for name in ("feelings", "direct"))
        assert result["test"] == other["test"]
        print(json.dumps({{"said": done.output, "recipe": recipe, "result": result}}))
        """,
        home,
        HF_ENDPOINT=hub.url,
    )
    data = found["recipe"]["data"]
    pinned = {"hub": FEELINGS, "hub_config": "default", "hub_revision": SHA}
    pinned |= {"train": "train", "validation": 0.2, "test": "dev"}
    columns = {"task": "sequence", "text_column": "post", "label_column": "feeling"}
    assert data == pinned | columns | {"max_length": 62}
    assert found["recipe"]["name"] == "feelings"
    assert "not used" in found["said"]  # test, which has no labels
    assert found["result"]["test"]["items"] == 15
    assert {"negative", "positive"} == set(found["result"]["labels"])


DRAFTS = {
    "configuration": (MOODS, ["data.hub_config=loud"], {"hub_config": "loud", "label_column": "feeling"}),
    "default": (TONES, [], {"hub_config": "loud", "hub_revision": SHA}),
    "revision": (FEELINGS, ["data.hub_revision=main"], {"hub_revision": "main"}),
    "code": (SCRIPTED, ["data.hub_config=sa_someeng"], {"hub_revision": REVISION, "label_column": "sa"}),
    "words": (SCRIPTED, ["data.hub_config=lid_someeng"], {"task": "token", "text_column": "words"}),
    "split": (FEELINGS, ["data.train=dev"], {"train": "dev", "validation": 0.2, "test": None}),
}
REFUSED = {
    "configurations": ([MOODS], ["data.hub_config", "calm", "loud"]),
    "configurations of code": ([SCRIPTED], ["data.hub_config", "lid_someeng, pos_someeng, sa_someeng"]),
    "wrong configuration": ([MOODS, "data.hub_config=lout"], ["data.hub_config", "lout", "loud"]),
    "wrong split": ([FEELINGS, "data.train=trai"], ["no split 'trai'", "train, dev, test"]),
    "not found": (["someone/nothing"], ["no file or folder", "someone/nothing", "hf auth login"]),
    "gated": ([GATED], [GATED, "Ask for access", "hf auth login"]),
    "gated copy": ([GATED, f"data.hub_revision={REVISION}"], [GATED, "Ask for access", "hf auth login"]),
}


@pytest.fixture(scope="module")
def drafts(run, hub, home):
    code = f"""
        found = {{}}
        for name, (repo, more, _) in {DRAFTS!r}.items():
            more += ["model.backbone=none", "model.backbone_path=nowhere"]
            start._choose_backbone = lambda given, *_: (given, None, start.Decision("model.backbone", "none", ""))
            found[name] = start.make_draft(*start._split_arguments([repo, *more]), [], True).content["data"]
        for name, (arguments, _) in {REFUSED!r}.items():
            for command in ("init", "train"):
                found[f"{{command}} {{name}}"] = " ".join(CliRunner().invoke(app, [command, *arguments]).output.split())
        print(json.dumps(found))
    """
    found = run(code, home, HF_ENDPOINT=hub.url)
    assert len(found) > 1, found
    return found


@pytest.mark.parametrize("name", DRAFTS)
def test_what_is_decided_for_an_id(drafts, name):
    assert drafts[name].items() >= DRAFTS[name][2].items()


@pytest.mark.parametrize("command", ["init", "train"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_id_that_cannot_be_read_gives_one_error(drafts, name, command):
    found = drafts[f"{command} {name}"]
    assert found.count("Error: ") == 1
    assert "Traceback" not in found
    for message in REFUSED[name][1]:
        assert message in found


def test_offline_an_id_is_found_in_the_cache_or_the_error_names_the_way_out(run, hub, home, tmp_path):
    code = f"""
        from unittest.mock import patch
        from datasets import DatasetBuilder
        start._choose_backbone = lambda given, *_: (given, None, start.Decision("model.backbone", "none", ""))
        with patch.object(DatasetBuilder, "as_dataset", autospec=True, side_effect=DatasetBuilder.as_dataset) as load:
            draft = start.make_draft([], ["data.hub={FEELINGS}", "model.backbone=none"], [], True)
        print(json.dumps({{"data": draft.content["data"], "decisions": [str(one) for one in draft.decisions],
                           "train": len(draft.corpus.train), "loaded": load.call_count}}))
    """
    online = run(code, home, HF_ENDPOINT=hub.url)
    assert (online["data"]["hub_revision"], online["loaded"]) == (SHA, 1)
    assert run(code, home, HF_HUB_OFFLINE="1") == online
    error = run(code, tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert "cannot be reached" in error
    assert "data.path" in error


def test_a_cached_copy_of_another_revision_is_not_taken_for_the_one_that_is_asked_for(run, hub, tmp_path):
    copies, newer = tmp_path / "datasets/someone___feelings/default/0.0.0", "f" * 40
    code = """
        import io, logging, shutil
        logging.getLogger("datasets").addHandler(logging.StreamHandler(said := io.StringIO()))
        def read(revision):
            try:
                place = {"hub": "someone/feelings", "text_column": "post", "label_column": "feeling"}
                return len(read_split(SourceConfig(**place, hub_revision=revision), "train", "sequence"))
            except DataError as error:
                return error.code
    """
    assert run(f"{code}    print(json.dumps(read('main')))", tmp_path, HF_ENDPOINT=hub.url) == 60
    shutil.copytree(copies / SHA, copies / newer, copy_function=lambda old, new: Path(new).touch())
    shutil.copy(copies / SHA / "dataset_info.json", copies / newer)
    os.utime(copies / newer, (2e9, 2e9))
    code += f"""
        found = [read(revision) for revision in ("main", {SHA!r}, "v9")]
        shutil.rmtree({str(copies / SHA)!r})
        print(json.dumps([*found, read("main"), said.getvalue()]))
    """
    assert run(code, tmp_path, HF_HUB_OFFLINE="1") == [60, 60, "hub-revision", "hub-revision", ""]
