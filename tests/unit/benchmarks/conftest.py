"""Makes the modules of the benchmarks importable as their own scripts import each other."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3] / "benchmarks" / "studies")]
