"""The command line under FSDP on CPUs, for `accelerate launch`.

accelerate shards on GPUs alone; here it is told that gloo's processes were such.
"""

import os

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _gloo(self, cpu=False, sagemaker_dp=False, backend=None):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _gloo
    from tokmask_peft.cli import main

    main()
