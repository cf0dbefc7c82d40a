"""The command line under FSDP on CPUs, for `accelerate launch`: two commands, one after the other, with `then` between.

accelerate shards only on GPUs; here it is made to take gloo's processes for such. Where SEEN names a folder, each
process leaves there, as RANK.pt, whether FSDP had its embedding, and the ids that each masked forward looked up.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _gloo(self, cpu=False, sagemaker_dp=False, backend=None):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def _keep_what_is_seen(folder):
    from torch.distributed.fsdp import FSDPModule

    from tokmask_peft.masking.masker import TokenMasker

    mask, seen = TokenMasker._mask, {"sharded": [], "ids": [], "mask": None}

    def kept(self, module, args, kwargs):
        swapped = mask(self, module, args, kwargs)
        if swapped is not None and self.config.p > 0:
            found_args, found_kwargs = swapped
            seen["ids"].append(next(iter((*found_args, *found_kwargs.values()))).clone())
            seen["sharded"].append(isinstance(module, FSDPModule))
            seen["mask"] = self.mask_token.id
            torch.save(seen, f"{folder}/{self.rank}.pt")
        return swapped

    TokenMasker._mask = kept


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _gloo
    if "SEEN" in os.environ:
        _keep_what_is_seen(os.environ["SEEN"])
    from tokmask_peft.cli import main

    program, *given = sys.argv
    at = given.index("then")
    for command in (given[:at], given[at + 1 :]):
        sys.argv = [program, *command]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise
