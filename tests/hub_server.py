"""A stand-in for the Hugging Face Hub on loopback: the API that huggingface_hub uses to push and pull models.

It takes weights through the LFS protocol with verification, and serves them by redirect to another host name.
Faults can be ordered: `server.fail("/commit/", 500)`. The xet protocol is not spoken: clients set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml
from hub_http import Fault, Transport
from hub_repository import Repository, git_oid

TOKEN = "hf_StandInTokenOfZelda0123456789"
USER = "zelda"


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is not an error here."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Another origin, as the Hub's storage is: the token must not go there."""
        return f"http://localhost:{self.server_address[1]}/storage"

    def fail(self, pattern: str, how: int | str, times: int = 1, message: str = "ordered by the test") -> None:
        """Answer requests whose `METHOD path` matches with a status, `drop` the connection, or `hang`."""
        self.faults.append(Fault(pattern, how, times, message))

    def add_model(self, repo_id: str, folder: Path) -> None:
        """Put a folder into a public repository."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        large = {name for name in files if name.endswith(".safetensors")}
        self.repositories[repo_id] = Repository(files=files, large=large)


class _Handler(Transport):
    server: HubServer

    def _any(self) -> None:
        self.path_only = unquote(urlparse(self.path).path)
        self.body = self.read()
        line = f"{self.command} {self.path_only}"
        self.server.requests.append((self.command, self.path_only, self.headers.get("Authorization")))
        for fault in self.server.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                self.misbehave(fault)
                return
        for pattern, action in _ROUTES:
            if found := re.fullmatch(pattern, line):
                action(self, *found.groups())
                return
        self.error(404, "no such endpoint")

    do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """Find a repository that the client may see, or answer with the error and return None."""
        found = self.server.repositories.get(repo_id)
        if write and not self._authorised():
            self.error(401, "Invalid credentials in Authorization header")
        elif found is None or (found.private and not self._authorised()):
            self.error(404, "Repository not found", "RepoNotFound")
        elif write and not repo_id.startswith(f"{USER}/"):
            self.error(403, "you have no write access")
        else:
            return found
        return None

    def whoami(self) -> None:
        if not self._authorised():
            self.error(401, "Invalid credentials in Authorization header")
            return
        self.json({"type": "user", "name": USER, "orgs": [{"name": "castle"}], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        if not self._authorised():
            self.error(401, "Invalid credentials in Authorization header")
            return
        owner = asked["organization"] or USER
        if owner == "nowhere":
            self.error(404, "namespace not found")
            return
        if owner != USER:
            self.error(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
            return
        repo_id = f"{owner}/{asked['name']}"
        exists = repo_id in self.server.repositories
        self.server.repositories.setdefault(repo_id, Repository(private=asked.get("visibility") == "private"))
        self.json({"url": f"{self.server.url}/{repo_id}", "name": repo_id}, status=409 if exists else 200)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            head = yaml.safe_load(content.split("---")[1])
            errors = [] if isinstance(head, dict) else [{"message": "no metadata"}]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        self.json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def info(self, repo_id: str, *_: str) -> None:
        if (found := self._repository(repo_id)) is not None:
            siblings = [{"rfilename": name} for name in found.files]
            self.json({"id": repo_id, "sha": found.sha, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str) -> None:
        if (found := self._repository(repo_id)) is not None:
            self.json([found.entry(name) for name in sorted(found.files)])

    def paths_info(self, repo_id: str) -> None:
        if (found := self._repository(repo_id)) is not None:
            asked = json.loads(self.body)["paths"]
            self.json([found.entry(name) for name in asked if name in found.files])

    def preupload(self, repo_id: str) -> None:
        if (found := self._repository(repo_id, write=True)) is None:
            return
        self.json({"files": [found.upload_mode(file["path"]) for file in json.loads(self.body)["files"]]})

    def batch(self, repo_id: str) -> None:
        if self._repository(repo_id, write=True) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.storage:
                upload = {"href": f"{self.server.storage_url}/{asked['oid']}?signature=secret"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/verify"}}
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.error(400, "content and name differ")
            return
        self.server.storage[oid] = self.body
        self.server.uploads.append(oid)
        self.send(200, b"", {})

    def verify(self) -> None:
        asked = json.loads(self.body)
        stored = self.server.storage.get(asked["oid"])
        if stored is None or len(stored) != asked["size"]:
            self.error(422, "not what was announced")
        else:
            self.json({})

    def commit(self, repo_id: str) -> None:
        if (found := self._repository(repo_id, write=True)) is None:
            return
        found.commit([json.loads(line) for line in self.body.splitlines()], self.server.storage)
        self.json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{found.sha}", "commitOid": found.sha})

    def resolve(self, repo_id: str, name: str) -> None:
        if (found := self._repository(repo_id)) is None:
            return
        if name not in found.files:
            self.error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": found.sha})
            return
        data = found.files[name]
        if name in found.large:
            oid = hashlib.sha256(data).hexdigest()
            self.server.storage[oid] = data
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": found.sha}
            self.send(302, b"", {"Location": f"{self.server.storage_url}/{oid}", **linked})
        else:
            self.send(200, data, {"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": found.sha})

    def fetch(self, oid: str) -> None:
        self.send(200, self.server.storage[oid], {"ETag": f'"{oid}"'})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/\w+", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/\w+", _Handler.tree),
    (rf"POST /api/models/{_REPO}/paths-info/\w+", _Handler.paths_info),
    (rf"POST /api/models/{_REPO}/preupload/main", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/main", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/(\w+)", _Handler.store),
    (r"(?:GET|HEAD) /storage/(\w+)", _Handler.fetch),
    (r"POST /verify", _Handler.verify),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/\w+/(.+)", _Handler.resolve),
]
