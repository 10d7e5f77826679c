"""Make ``bench/`` importable, as pytest does when it runs the benchmarks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))
