"""Makes `tests/` importable, so that every test can say `from tiny_models import build`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
