"""The masker needs torch and pydantic and nothing else: not transformers, not PEFT, and of the package only errors."""

import subprocess
import sys

CODE = """
import importlib, importlib.metadata, importlib.util, re, sys

def closure(name, found):
    if name not in found:
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            return found
        found.add(name)
        for line in requires:
            if "extra ==" not in line:
                closure(re.match(r"[\\w.-]+", line)[0], found)
    return found

normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
allowed = {normal(name) for root in ("torch", "pydantic") for name in closure(root, set())}
homes = importlib.metadata.packages_distributions()
blocked = {module for module, dists in homes.items() if not allowed & {normal(name) for name in dists}}
blocked -= {"tokmask_peft", *sys.modules}
assert {"transformers", "peft", "yaml", "accelerate"} <= blocked

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Block())
import tokmask_peft.masking
for name in ("config", "embedding", "masker", "pattern", "replacement", "schedule"):
    importlib.import_module(f"tokmask_peft.masking.{name}")
from tokmask_peft.masking import TokenMaskConfig, TokenMasker
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 4)
    def get_input_embeddings(self):
        return self.embedding

class Tokenizer:
    pad_token_id, mask_token_id, mask_token, all_special_ids, added_tokens_decoder = 0, 1, "m", [0, 1], {}
    __len__, get_vocab = lambda self: 20, lambda self: {}

torch.manual_seed(0)
model = Model()
seen = []
with TokenMasker.attach(model, Tokenizer(), TokenMaskConfig(p=0.5)):
    model.embedding.register_forward_pre_hook(lambda module, ids: seen.append(ids[0]))
    model.train().embedding(torch.arange(20)[None])
assert (seen[0] == 1).sum() > 3
own = {name for name in sys.modules if name.startswith("tokmask_peft.")}
assert all(name.startswith(("tokmask_peft.masking", "tokmask_peft.errors")) for name in own), own
"""


def test_the_masker_runs_with_torch_and_pydantic_only():
    subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], check=True)
