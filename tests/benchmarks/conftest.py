"""The benchmark scripts import each other by name, as they do when run from the command line."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
