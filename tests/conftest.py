"""Makes `tests/` importable (`from tiny_models import build`), and every run of the tests the same."""

import gc
import os
import signal
import sys

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# One run draws what the next one draws; `--hypothesis-profile=default` looks for new cases.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


_MODULES = set()
gc.disable()  # until the tests are collected: what they import stays


def pytest_collection_finish():
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Let every test start from one seed, whatever ran before it in its process, and with little to collect.

    Each training collects garbage, which takes a second with the million objects that imports and other tests left.
    """
    if item.path not in _MODULES:
        _MODULES.add(item.path)
        gc.collect()
        gc.freeze()
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture
def in_terminal():
    """Let this process and its children hear the end of a terminal, also if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def counted_once():
    """Count the memory of a model and a batch once in a process: it is half of what a tiny run takes."""
    from tokmask_peft.model.memory import estimate

    known, count = {}, estimate.count_step

    def counted(recipe, setting, *rest):
        used = recipe.model_dump_json(
            include={"model": True, "adapter": True, "data": {"task"}, "masking": {"trainable_mask"}}
        )
        key = (used, repr(setting), *rest)
        if key not in known:
            known[key] = count(recipe, setting, *rest)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "count_step", counted)
        yield
