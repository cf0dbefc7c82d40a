"""Two processes mask differently, and each as its rank alone decides."""

import os

import torch
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokmask_peft.masking import TokenMaskConfig, TokenMasker

IDS = torch.arange(5, 45).expand(4, 40)


class TinyTokenizer:
    """What the masker asks of a tokenizer; processes start faster without transformers."""

    mask_token, mask_token_id, unk_token_id, pad_token_id, eos_token_id = "[MASK]", 1, 2, 0, 3
    all_special_ids = [0, 1, 2, 3]
    added_tokens_decoder = {}

    def __len__(self):
        return 50

    def get_vocab(self):
        return {f"t{i}": i for i in range(50)}


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return self.embedding(ids).mean()


def masked_ids(model, **kwargs):
    seen = []
    with TokenMasker.attach(model, TinyTokenizer(), TokenMaskConfig(p=0.5), **kwargs):
        inner = getattr(model, "module", model)
        handle = inner.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.train()(IDS).backward()
        handle.remove()
    return seen[0]


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(masked_ids(DistributedDataParallel(TinyModel())), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # once in many runs a thread of gloo outlived the interpreter: "terminate called without …"


def test_ranks_differ_and_match_the_rank_argument(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not torch.equal(*seen)
    for rank, ids in enumerate(seen):
        assert torch.equal(ids, masked_ids(TinyModel(), rank=rank))
        assert 40 < (ids == 1).sum() < 120
