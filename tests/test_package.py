"""What importing the package loads, and which part may import which."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PUBLIC = (
    "LLaMAVIDLlavaConfig",
    "LLaMAVIDLlavaVisionConfig",
    "LLaMAVIDLlavaQFormerConfig",
    "LLaMAVIDLlavaImageProcessor",
    "LLaMAVIDLlavaProcessor",
    "LLaMAVIDLlavaForConditionalGeneration",
)


def test_import_is_light():
    """The package alone imports no JAX; all public classes import no torch, video reader or transformers."""
    code = "import sys, llamavid_jax; print(*sys.modules); [getattr(llamavid_jax, name) for name in sys.argv[1:]]"
    code += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *PUBLIC], cwd=ROOT, check=True, capture_output=True, text=True)
    before, after = (set(line.split()) for line in done.stdout.splitlines())
    assert not {"jax", "numpy", "PIL"} & before
    assert "jax" in after and not {"torch", "av", "transformers", "tensorflow"} & after


@pytest.mark.parametrize("first", ["llamavid_jax", "transformers"])
def test_transformers_finds_the_classes(first):
    """The order of imports does not matter."""
    code = f"import {first}, sys; import llamavid_jax; from transformers import AutoConfig, AutoProcessor; "
    code += "print(*[type(kind.from_pretrained(sys.argv[1])).__name__ for kind in (AutoConfig, AutoProcessor)])"
    command = [sys.executable, "-c", code, str(ROOT / "demo" / "model")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["LLaMAVIDLlavaConfig", "LLaMAVIDLlavaProcessor"]


def test_unknown_names_are_refused():
    import llamavid_jax

    with pytest.raises(AttributeError, match="LLaMAVIDLlavaConfig"):
        llamavid_jax.LlavaConfig  # noqa: B018


def imports(file: Path) -> set[str]:
    """Modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


PACKAGE = ROOT / "llamavid_jax"
# What each room (a folder or file of the package) may import, besides itself.  Rooms follow those they import.
GROUND = {"buckets", "copies", "errors", "files", "pickles", "shapes", "uploads"}
BELOW = {
    "errors": set(),
    "buckets": {"errors"},
    "copies": {"buckets", "errors"},
    "uploads": {"buckets", "errors"},
    "files": {"buckets", "copies", "errors", "uploads"},
    "shapes": set(),
    "pickles": {"errors"},
    "config": GROUND,
    "media": GROUND | {"config"},
    "text": GROUND,
    "weights": GROUND | {"config"},
    "parallel": GROUND | {"config", "weights"},
    "attention": {"parallel"},
    "models": GROUND | {"config", "weights", "parallel", "attention"},
    "checkpoints": GROUND | {"config", "text", "weights", "parallel", "models"},
    "data": GROUND | {"config", "media", "text", "checkpoints"},  # validate.py needs the vision tower's hash
}
BELOW["auto"] = set()  # it imports the public classes on demand
BELOW["inference"] = set(BELOW) - {"data"}
BELOW["training"] = set(BELOW) - {"inference"}
BELOW["precompile"] = set(BELOW)
BELOW["commands"] = set(BELOW)
BELOW["evaluation"] = BELOW["inference"] | {"inference", "commands"}
BELOW["serving"] = set(BELOW) - {"data", "training", "precompile", "evaluation"}
BELOW["harness"] = BELOW["evaluation"] | {"evaluation"}
WITHOUT_JAX = {*GROUND, "config", "media", "text", "weights", "data"}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_what_stands_below_it(file):
    """Imports inside functions count too.  torch is used in `conversion/` only, which the package never imports."""
    names = imports(file)
    roots = {name.split(".")[0] for name in names}
    assert not {"torch", "conversion", "infer", "train", "tests"} & roots
    if room(file) in WITHOUT_JAX:
        assert not {"jax", "flax", "transformers"} & roots
    taken = {name.split(".")[1] for name in names if name.startswith("llamavid_jax.")}
    assert taken - {room(file)} <= BELOW[room(file)] | set(PUBLIC)


def test_no_circle():
    """No import cycle among files; BELOW's order excludes cycles of rooms.  Imports inside functions count too."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    arrows = {module: imports(file) & modules.keys() - {module} for module, file in modules.items()}
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("folder", ["conversion", "demo"])
def test_folders_that_stand_in_two_places(folder):
    """They are at the repository's top and in the installed package, so their files import each other relatively."""
    absolute = re.compile(rf"^\s*(from|import) {folder}\b", re.MULTILINE)
    assert not [file.name for file in (ROOT / folder).glob("*.py") if absolute.search(file.read_text(encoding="utf-8"))]
