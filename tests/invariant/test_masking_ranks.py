"""Two processes mask differently, and each as its rank alone decides; also where FSDP shards the embedding."""

import os

import forked
import torch
from tiny_models import assert_typical
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tokmask_peft.masking.embedding import is_sharded, whole
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe import TokenMaskConfig

IDS = torch.arange(5, 45).expand(4, 40)


class TinyTokenizer:
    """What the masker asks of a tokenizer."""

    mask_token, mask_token_id, unk_token_id, pad_token_id, eos_token_id = "[MASK]", 1, 2, 0, 3
    all_special_ids, added_tokens_decoder, rows = [0, 1, 2, 3], {}, 50

    def __len__(self):
        return self.rows

    def get_vocab(self):
        return {f"t{i}": i for i in range(self.rows)}


class SpareTokenizer(TinyTokenizer):
    """Without a mask token: a spare row becomes one."""

    mask_token = mask_token_id = None
    rows = 45


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return self.embedding(ids).mean() * self.scale


def masked_ids(model, tokenizer=None, **kwargs):
    seen = []
    with TokenMasker.attach(model, tokenizer or TinyTokenizer(), TokenMaskConfig(p=0.5), **kwargs):
        inner = getattr(model, "module", model)
        handle = inner.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.train()(IDS).backward()
        handle.remove()
    return seen[0]


def worker(rank, folder, look):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(look(), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # once in many runs a thread of gloo outlived the interpreter: "terminate called without …"


def spawned(folder, look):
    forked.two(worker, str(folder), look)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def replicated():
    return masked_ids(DistributedDataParallel(TinyModel()))


def test_ranks_differ_and_match_the_rank_argument(tmp_path):
    seen = spawned(tmp_path, replicated)
    assert not torch.equal(*seen)
    for rank, ids in enumerate(seen):
        assert torch.equal(ids, masked_ids(TinyModel(), rank=rank))
        assert 40 < (ids == 1).sum() < 120


def sharded():
    torch.manual_seed(0)
    model = TinyModel()
    model.embedding.requires_grad_(False)
    fully_shard(model.embedding)
    fully_shard(model)
    found = {"born": whole(model.embedding.weight.detach()).clone(), "sharded": is_sharded(model.embedding.weight)}
    with TokenMasker.attach(model, SpareTokenizer(), TokenMaskConfig(p=0.5, mask_token="spare")):
        found["masked"] = whole(model.embedding.weight.detach()).clone()
    found["ids"] = masked_ids(model, SpareTokenizer())
    return {**found, "after": whole(model.embedding.weight.detach())}


def test_a_sharded_embedding_is_masked_as_a_whole_one(tmp_path):
    for rank, found in enumerate(spawned(tmp_path, sharded)):
        assert found["sharded"]
        assert torch.equal(found["ids"], masked_ids(TinyModel(), SpareTokenizer(), rank=rank))
        changed = (found["masked"] != found["born"]).any(1).nonzero().flatten().tolist()
        assert changed == [49]
        assert_typical(found["masked"][49], found["born"][:45])
        assert torch.equal(found["after"], found["born"])
