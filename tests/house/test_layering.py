"""Imports point down: an AST walk over every absolute and relative import, whether at module level or in a function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from house_files import ROOT, modules, python_files

# Lowest first; the members of one row do not import each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "moved", "patched"),
    ("derivative",),
    ("layout", "collectives"),
    ("mesh",),
    ("sharding",),
    ("kernels",),
    ("attention",),
    ("bounded",),
    ("decode",),
    ("nn",),
    ("models", "data"),
    ("engine",),
    ("config",),
    ("train", "plan", "generation"),
    ("rehearse", "hf"),
    ("launch",),
    ("cli",),
)
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}
# A second file of a part that is a module, not a folder.
SAME_PART = {"rendezvous": "mesh", "network": "mesh", "slurm": "mesh", "sameness": "mesh", "world": "mesh"}

# package: where it may be imported (path prefixes). Tests and benchmarks are not the library and are not listed.
OWNERS = {
    "triton": ("kernels/", "longctx/kernels/"),
    "deepspeed": ("longctx/engine", "longctx/launch/", "longctx/rehearse/", "launch/"),
    "yaml": ("longctx/config/",),
    "transformers": (
        "longctx/models/",
        "longctx/decode/caches/",
        "longctx/data/tokenizers/tokenizer.py",
        "longctx/generation/",
        "longctx/hf/",
    ),
}
# These answer `check`, `explain` and `--help` in half a second, so torch waits until something runs.
TORCH_LATER = ("longctx/config/", "longctx/launch/", "longctx/cli/", "longctx/__init__.py", "launch/")


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Every dotted name that ``tree`` imports, relative ones resolved against ``module``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + int(is_package)
                base = ".".join(parents[:keep] + ([base] if base else []))
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def at_module_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import: no function bodies, no ``if TYPE_CHECKING``."""

    class Trim(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Trim().visit(ast.parse(ast.unparse(tree)))


def part_of(module: str) -> str:
    """``longctx.attention.ring`` → ``attention``."""
    part = module.split(".")[1]
    return SAME_PART.get(part, part)


def test_every_part_has_a_place_in_the_order() -> None:
    unknown = {part_of(name) for name, _ in modules() if name != "longctx"} - set(LEVEL)
    assert not unknown, f"new top-level parts {sorted(unknown)}: give them a row in ORDER"


def test_imports_point_down() -> None:
    wrong = []
    for name, path in modules():
        if name == "longctx":
            continue  # the table of contents, lazy
        here = part_of(name)
        for target in imports(ast.parse(path.read_text()), name, path.name == "__init__.py"):
            if not target.startswith("longctx."):
                continue
            there = part_of(target)
            if target.count(".") == 1 and there not in LEVEL and there != "__version__":
                wrong.append(f"{name} imports {target} from the table of contents: name its module instead")
            if there in LEVEL and there != here and LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{name} ({here}) imports {target} ({there}), which does not stand before it")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_module_imports_another_in_a_circle() -> None:
    graph = {}
    names = {name for name, _ in modules()}
    for name, path in modules():
        targets = imports(at_module_level(ast.parse(path.read_text())), name, path.name == "__init__.py")
        graph[name] = {target for target in targets if target in names and target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("package", OWNERS)
def test_who_may_import(package: str) -> None:
    wrong = [
        f"{path} imports {target}"
        for path in python_files("longctx", "launch", "kernels")
        if not path.as_posix().startswith(OWNERS[package])
        for target in imports(ast.parse((ROOT / path).read_text()), "x.x", False)
        if target.split(".")[0] == package
    ]
    assert not wrong, f"only {OWNERS[package]} may import {package}:\n" + "\n".join(wrong)


def test_torch_is_not_imported_where_answers_must_be_quick() -> None:
    wrong = []
    for path in python_files("longctx", "launch"):
        if path.as_posix().startswith(TORCH_LATER):
            tree = at_module_level(ast.parse((ROOT / path).read_text()))
            wrong += [f"{path}: {target}" for target in imports(tree, "x.x", False) if target.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_what_it_should() -> None:
    source = "from ..engine import x\ndef f():\n    import triton.language\nif TYPE_CHECKING:\n    import torch\n"
    tree = ast.parse(source)
    assert imports(tree, "longctx.attention.ring", False) >= {"longctx.engine", "triton.language", "torch"}
    assert imports(at_module_level(tree), "longctx.attention.ring", False) == {"longctx.engine", "longctx.engine.x"}
    assert isinstance(ROOT, Path)
