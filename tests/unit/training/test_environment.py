import pytest

from tokmask_peft.errors import RunError
from tokmask_peft.training.environment import check_sharding


def test_only_the_second_fsdp_is_taken(monkeypatch):
    check_sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"FSDP 1 was chosen.*fsdp_version: 2"):
        check_sharding()
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match="DeepSpeed was chosen"):
        check_sharding()
