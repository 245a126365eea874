"""Who may import whom: method and host do not know each other, and their parts know only what they must."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD, HOST = ROOT / "comp_patches", ROOT / "llava"

CORE_MAY_USE = {"torch", "numpy", "PIL", "safetensors", "comp_patches"}
BRIDGES = ("llava_plugin.py", "hf.py", "commands", "upstream")

# Inside the method, lowest first: a module imports from lower rows only.
METHOD_LAYERS = [
    {"grid", "packing", "checkpoint", "cosine_scores", "adapter", "alignment_targets", "sdpa"},
    {"image_processor", "rope", "position_embedding", "attention", "word_prior", "alignment_cross_entropy"},
    {"layers", "alignment_loss"},
    {"vision_config", "alignment_module"},
    {"vision_transformer", "contrastive_loss"},
    {"families"},
    {"tower_weights"},
    {"towers"},
    {"export", "convert", "show_alignment"},
]

HOST_MAY_NOT_USE = {
    "data": {"model", "train", "eval", "serve"},
    "model": {"data", "train", "eval", "serve"},
    "train": {"eval", "serve"},
    "eval": {"train", "serve"},
    "serve": {"train", "eval"},
}


def imports(file: Path, *, everywhere: bool) -> set[str]:
    """Modules that a file imports: at import time only, or in functions and `if __name__` blocks as well."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if everywhere else list(top_level(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level(node: ast.AST):
    """Statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        is_main = isinstance(child, ast.If) and "__name__" in ast.unparse(child.test)
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_main:
            yield child
            yield from top_level(child)


def files(package: Path):
    return [pytest.param(file, id=str(file.relative_to(ROOT))) for file in sorted(package.rglob("*.py"))]


def is_core(file: Path) -> bool:
    return file.relative_to(METHOD).parts[0] not in BRIDGES


@pytest.mark.parametrize("file", [f for f in files(METHOD) if is_core(f.values[0])])
def test_the_core_imports_nothing_but_its_few_libraries(file):
    standard = sys.stdlib_module_names
    foreign = {name for name in imports(file, everywhere=False) if name.split(".")[0] not in standard | CORE_MAY_USE}
    assert not foreign
    later = {name.split(".")[0] for name in imports(file, everywhere=True)} - standard - CORE_MAY_USE
    assert later <= {"huggingface_hub", "flash_attn"}, later


@pytest.mark.parametrize("file", [f for f in files(METHOD) if not is_core(f.values[0])])
def test_bridges_reach_the_host_inside_functions_only(file):
    assert not {name for name in imports(file, everywhere=False) if name.split(".")[0] == "llava"}


@pytest.mark.parametrize("file", [f for f in files(METHOD) if is_core(f.values[0])])
def test_the_method_s_modules_import_downwards(file):
    layer_of = {name: i for i, names in enumerate(METHOD_LAYERS) for name in names}
    own = file.relative_to(METHOD).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in layer_of, f"{own} has no place in METHOD_LAYERS"
    for name in imports(file, everywhere=False):
        parts = name.split(".")
        if parts[0] == "comp_patches" and parts[1] != own:
            assert parts[1] in layer_of, f"the core imports the bridge {name}"
            assert layer_of[parts[1]] < layer_of[own], name


@pytest.mark.parametrize("file", files(HOST))
def test_the_host_never_names_the_method(file):
    assert not {name for name in imports(file, everywhere=True) if name.split(".")[0] == "comp_patches"}


@pytest.mark.parametrize("file", files(HOST))
def test_the_host_s_parts_know_only_what_they_must(file):
    own = file.relative_to(HOST).parts[0]
    used = {name.split(".")[1] for name in imports(file, everywhere=True) if name.startswith("llava.")}
    assert not used & HOST_MAY_NOT_USE.get(own, set())
