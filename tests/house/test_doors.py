"""Doors that a reader and a tool can follow: no private imports, no circles, one class per name, a test per module."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from house_files import ROOT, modules, project_files, python_files

FEWEST_LINES = 8  # an __init__, a __main__ or a list of names below this needs no test of its own


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def own_imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, module, name) of each ``from longctx… import name``."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longctx":
            for alias in node.names:
                yield node.lineno, node.module or "", alias.name


def test_no_private_name_crosses_a_module() -> None:
    wrong = [
        f"{path}:{line}: {module}.{name}"
        for path in python_files("longctx", "kernels", "launch", "benchmarks", "examples")
        for line, module, name in own_imports(path)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not wrong, "give these a public name:\n" + "\n".join(wrong)


def test_no_mocks_in_the_package() -> None:
    wrong = [path for path in python_files("longctx", "kernels", "launch") if "unittest" in (ROOT / path).read_text()]
    assert not wrong, wrong


def test_operators_are_called_as_objects() -> None:
    """``torch.ops.longctx.name`` is a string to every tool; the object that ``custom_op`` returns is not."""
    wrong = [
        f"{path}:{node.lineno}"
        for path in python_files("longctx", "kernels")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.longctx"
    ]
    assert not wrong, wrong


def test_no_two_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for path in python_files("longctx"):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.as_posix())
    shared = {name: places for name, places in homes.items() if len(places) > 1}
    assert not shared, f"one word, one meaning: {shared}"


def test_no_circle_behind_type_checking_either() -> None:
    names = {name for name, _ in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in modules():
        targets = set()
        for _, module, imported in own_imports(path.relative_to(ROOT)):
            full = f"{module}.{imported}"
            targets.add(full if full in names else module)
        graph[name] = targets & names - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_each_module_has_a_test_that_its_name_finds() -> None:
    tests = {path.stem for path in project_files() if path.parts[0] == "tests" and path.stem.startswith("test_")}
    missing = []
    for path in python_files("longctx"):
        stem, folder = path.stem, path.parent.name
        if (
            stem.startswith("__")
            or "kernels" in path.parts
            or len((ROOT / path).read_text().splitlines()) < FEWEST_LINES
        ):
            continue
        names = {f"test_{stem}", f"test_{folder}_{stem}", f"test_{stem}_{folder}"}
        if not names & tests and not any(t.startswith(f"test_{stem}_") or t.endswith(f"_{stem}") for t in tests):
            missing.append(path.as_posix())
    assert not missing, "no test file has the name of: " + ", ".join(missing)
