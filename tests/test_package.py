"""What importing the package costs, and which part may import which."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLASSES = (
    "LLaMAVIDLlavaConfig",
    "LLaMAVIDLlavaVisionConfig",
    "LLaMAVIDLlavaQFormerConfig",
    "LLaMAVIDLlavaImageProcessor",
    "LLaMAVIDLlavaProcessor",
    "LLaMAVIDLlavaForConditionalGeneration",
)


def test_import_is_light():
    """Under 2 s with every public class, and without torch, a video reader or transformers."""
    code = f"import sys, llamavid_jax; [getattr(llamavid_jax, n) for n in {CLASSES}]; print(*sys.modules)"
    seconds = []
    for _ in range(3):  # the fastest of three: another process may hold the cores
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", "import llamavid_jax"], cwd=ROOT, check=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert min(seconds) < 2
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"torch", "av", "transformers", "tensorflow"} & set(loaded.stdout.split())


def test_unknown_names_are_refused():
    import llamavid_jax

    with pytest.raises(AttributeError, match="LLaMAVIDLlavaConfig"):
        llamavid_jax.LlavaConfig  # noqa: B018


def imports(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


PACKAGE = sorted((ROOT / "llamavid_jax").rglob("*.py"))


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_layers(file):
    """`data/` is NumPy alone; torch lives in `conversion/`; nothing in the package imports `conversion`."""
    names = imports(file)
    roots = {name.split(".")[0] for name in names}
    assert not {"torch", "conversion", "infer"} & roots
    part = file.relative_to(ROOT / "llamavid_jax").parts[0]
    if part == "data":
        assert not {"jax", "flax", "transformers"} & roots
    above = {
        "data": ("models", "generation", "attention", "conditional_generation", "pretrained", "processor", "training"),
        "attention": ("models", "generation", "data", "conditional_generation", "pretrained", "training"),
        "models": ("generation", "conditional_generation", "pretrained", "processor", "training"),
        "generation": ("conditional_generation", "pretrained", "processor", "image_processor", "training"),
    }.get(part, ())
    assert not [name for name in names for other in above if name.startswith(f"llamavid_jax.{other}")]
