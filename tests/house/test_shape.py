"""The shape of the code: file lengths, folders that must stay without __init__, constructs that never appear."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from house_files import ROOT, project_files, python_files

LONGEST_FILE = 300
LONGEST_FUNCTION = 50
# path: why it may be longer
LONGER_FILES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}
# what these offer loads on first use
LAZY_PACKAGES = tuple(f"longctx/{name}/__init__.py" for name in ("kernels", "engine", "hf", "nn"))
# these were modules once, whose names they still give
MOVED_PACKAGES = (
    "longctx/attention/hybrid/__init__.py",
    "longctx/bounded/abc/__init__.py",
    "longctx/bounded/cosine/__init__.py",
    "longctx/launch/cluster/__init__.py",
    "longctx/models/hook/__init__.py",
    "longctx/train/checkpoint/__init__.py",
)


def test_files_are_short() -> None:
    lengths = {path.as_posix(): len((ROOT / path).read_text().splitlines()) for path in python_files()}
    long = {path: length for path, length in lengths.items() if length > LONGEST_FILE and path not in LONGER_FILES}
    assert not long, f"over {LONGEST_FILE} lines (one idea per file): {long}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement that is not the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def test_functions_are_short() -> None:
    long = []
    for path in python_files("longctx", "launch", "tools", "benchmarks"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > LONGEST_FUNCTION:
                name = f"{path.as_posix()}:{node.name}"
                if name not in LONGER_FUNCTIONS:
                    long.append(f"{name} {body_lines(node)}")
    assert not long, f"over {LONGEST_FUNCTION} lines: " + ", ".join(long)


def test_every_file_says_what_it_is_for() -> None:
    silent = [
        path.as_posix()
        for path in python_files()
        if (ROOT / path).stat().st_size and ast.get_docstring(ast.parse((ROOT / path).read_text())) is None
    ]
    assert not silent, f"these open without a docstring: {silent}"


@pytest.mark.parametrize("path", ["kernels/__init__.py", "launch/__init__.py", "tests/__init__.py"])
def test_folders_that_are_no_packages(path: str) -> None:
    """``kernels`` is also the name of a package that transformers imports: ours must not hide it."""
    assert not (ROOT / path).exists()


def test_sub_packages_are_empty() -> None:
    full = [
        path.as_posix()
        for path in python_files("longctx")
        if path.name == "__init__.py"
        and len(path.parts) > 2
        and (ROOT / path).read_text().strip()
        and path.as_posix() not in LAZY_PACKAGES + MOVED_PACKAGES
    ]
    assert not full, f"a sub-package's __init__ is empty, so that importing a part loads that part only: {full}"


def dotted(node: ast.expr) -> str:
    """``torch.load`` for the expression that means it, else the last name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.loads",
    "shelve.open",
    "subprocess.getoutput",
    "dist.all_gather_object",
    "dist.broadcast_object_list",
    "dist.gather_object",
}


def violations(source: str) -> list[str]:
    """Calls that run what a file or a peer says, and keywords that switch a safeguard off."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {name}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in (("shell", True), ("weights_only", False), ("trust_remote_code", True)):
                found.append(f"line {node.lineno}: {keyword.arg}={value}")
        if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
    return found


def test_nothing_executes_what_it_reads() -> None:
    wrong = [
        f"{path}: {what}"
        for path in python_files("longctx", "launch", "kernels", "tools", "benchmarks")
        for what in violations((ROOT / path).read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_what_it_should() -> None:
    source = ("torch.load(f)", "torch.load(f, weights_only=False)", "run('x', shell=True)", "yaml.load(s)", "eval('1')")
    assert len(violations("\n".join(source))) == len(source)
    assert not violations("torch.load(f, weights_only=True)\nmodel.eval()\nyaml.safe_load(s)")


def test_no_unfinished_marks() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    wrong = [
        f"{path}: {mark}"
        for path in python_files("longctx", "launch", "kernels", "tests")
        for mark in marks
        if mark in (ROOT / path).read_text()
    ]
    assert not wrong, wrong


def test_tests_do_not_skip() -> None:
    marks = ("mark." + "skip", "mark." + "xfail", "pytest." + "skip(", "pytest." + "xfail(", "importor" + "skip")
    wrong = [f"{path}: {mark}" for path in python_files("tests") for mark in marks if mark in (ROOT / path).read_text()]
    assert not wrong, f"a test that does not run proves nothing: {wrong}"


def test_no_absolute_paths_of_a_machine() -> None:
    text = (".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ".csv", ".json", "")
    wrong = [
        path.as_posix()
        for path in project_files()
        if path.suffix in text
        and path != Path("tests/house/test_shape.py")
        and any(place in (ROOT / path).read_text(errors="replace") for place in ("/work/", "/root/", "/home/"))
    ]
    assert not wrong, f"these name a folder of one machine: {wrong}"
