"""Paths of the repository's files."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = ROOT / "configs"
