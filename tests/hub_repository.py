"""A model repository of the stand-in Hub, in memory: its newest files, and which are in large-file storage."""

import base64
import hashlib
from dataclasses import dataclass, field


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()

    def entry(self, name: str) -> dict[str, object]:
        """Describe a file as the Hub's tree does."""
        data = self.files[name]
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if name in self.large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def upload_mode(self, name: str) -> dict[str, object]:
        """Say how a file is to come: weights through large-file storage."""
        large, stored = name.endswith(".safetensors"), self.files.get(name)
        oid = None if stored is None else hashlib.sha256(stored).hexdigest() if large else git_oid(stored)
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def commit(self, lines: list[dict], storage: dict[str, bytes]) -> None:
        """Apply a commit, all of it or nothing."""
        files, large = dict(self.files), set(self.large)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = storage[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.files, self.large = files, large
        self.commits.append(lines[0]["value"]["summary"])


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
