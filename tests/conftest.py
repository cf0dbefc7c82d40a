"""Makes `tests/` importable, so that every test can say `from tiny_models import build`."""

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def in_terminal():
    """Let this process and its children hear the end of a terminal, also if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
