"""What is copied into a checkout runs there: Python 3.10, PyTorch 2.1, and no package but the core's few."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comp_patches.upstream.package import MANIFEST, package_files

# Names of torch that the copy uses, each of which was looked up in a PyTorch 2.1.2. A new one belongs here once it was:
#     python -c "import torch; print(torch.NEW.NAME)"
IN_TORCH_2_1 = set((Path(__file__).parent.parent / "data" / "torch_2_1_names.txt").read_text().split())
# Younger names, which the code asks for only where they are.
GUARDED = {
    "torch._C._SetExcludeDispatchKeyGuard",
    "torch.amp.is_autocast_available",
    "torch.compiler.is_compiling",
    "torch.get_autocast_dtype",
    "torch.library.custom_op",
    "torch.nn.attention.flex_attention.BlockMask.from_kv_blocks",
    "torch.nn.attention.flex_attention.flex_attention",
    "torch.nn.attention.varlen.varlen_attn",
}
SOURCES = {path: source for path, source in package_files().items() if path != MANIFEST}


def names_of(source: str) -> set[str]:
    """The dotted names below torch that a file uses, under whatever name it imports them."""
    tree, bound = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name.partition(".")[0]: alias.asname and alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    bound = {name: origin or name for name, origin in bound.items()}
    found = {origin for origin in bound.values() if origin.startswith("torch.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            head, _, rest = dotted.partition(".")
            if re.fullmatch(r"[\w.]+", dotted) and bound.get(head, "").partition(".")[0] == "torch":
                found.add(f"{bound[head]}.{rest}")
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def imported(source: str) -> set[str]:
    """The modules that a file imports, anywhere but in what it does as a program."""
    tree = ast.parse(source, feature_version=(3, 10))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    nodes = list(ast.walk(tree))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return found | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", SOURCES)
def test_it_is_python_3_10_and_imports_what_is_there(path):
    modules = imported(SOURCES[path])
    own = {module for module in modules if module.partition(".")[0] == "llava"}
    paths = {module.removeprefix("llava.comp_patches").lstrip(".").replace(".", "/") for module in own}
    assert all({f"{path}.py", f"{path}/__init__.py".lstrip("/")} & SOURCES.keys() for path in paths), paths
    later = {"huggingface_hub", "flash_attn", "deepspeed"}  # inside functions
    known = sys.stdlib_module_names | {"torch", "numpy", "PIL", "safetensors"} | later
    assert {module.partition(".")[0] for module in modules - own} <= known


def test_it_asks_torch_for_nothing_younger_than_2_1():
    used = set().union(*(names_of(source) for source in SOURCES.values()))
    assert used - IN_TORCH_2_1 - GUARDED == set()
    assert used >= GUARDED  # else a guard is no longer needed


def test_the_copy_runs_beside_no_other_package(tmp_path):
    """The copied files alone, under their new name."""
    for path, source in SOURCES.items():
        file = tmp_path / "llava" / "comp_patches" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    (tmp_path / "llava" / "__init__.py").write_text("")
    code = "from llava.comp_patches.upstream import hooks; import sys;"
    code += "print('comp_patches' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_list_of_names_is_one_of_torch_names():
    for name in sorted(IN_TORCH_2_1):
        found = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)
