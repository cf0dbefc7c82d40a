import pytest

from tokmask_peft.errors import RunError
from tokmask_peft.training.environment import check_sharding


def refused():
    with pytest.raises(RunError, match="fsdp_version: 2") as caught:
        check_sharding()
    return caught.value.code, caught.value.fields["chosen"]


def test_only_the_second_fsdp_is_taken(monkeypatch):
    check_sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refused() == ("sharding", "FSDP 1")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert refused() == ("sharding", "DeepSpeed")
