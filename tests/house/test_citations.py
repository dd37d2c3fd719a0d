"""Nothing is cited that is not in the repository: pages, their sections, and source files."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

from house_files import ROOT, project_files

TEXT = {".md", ".py", ".yaml", ".yml", ".toml", ".sh", ".cfg"}
HERE = Path("tests/house/test_citations.py")
# Notes that stand outside of the repository, and how they used to be cited.
FOREIGN = re.compile(
    r"\bmethods(?:\.md)? \d|\bperformance(?:\.md)? [PS]\d|\breliability(?:\.md)? [A-Z]\d|(?<!\.com/)\bspec/"
)
PAGE = re.compile(r"(?<![\w/.-])((?:docs/|\.\./)?(?:[\w-]+/)*[\w-]+\.md)(?:#([\w-]+))?`?,?((?:,?\s+\"[^\"\n]+\")*)")
SOURCE_FILE = re.compile(r"(?<![\w/.<>*{}-])((?:[\w-]+/)*[a-z_][\w-]*\.py)\b")
NAME_IN_FILE = re.compile(r"`([\w.]+)` of\s+`((?:[\w-]+/)+[\w-]+\.py)`")
NOT_OURS = {
    "comparison.md": "written by benchmarks/bounded/summary.py",
    "docs/source/blog/cp_benchmark.md": "MagiAttention's",
    "performance_long_sequence.md": "NeMo's",
    "script.py": "the reader's",
    "your_script.py": "the reader's",
}
"""Files of others, or written by a run."""


@cache
def pages() -> dict[str, str]:
    return {path.as_posix(): (ROOT / path).read_text() for path in project_files() if path.suffix == ".md"}


@cache
def sections(page: str) -> frozenset[str]:
    """The titles of a page, and their anchors."""
    text = re.sub(r"^```.*?^```", "", pages()[page], flags=re.MULTILINE | re.DOTALL)
    titles = [title.strip().strip("*") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return frozenset(title.replace("`", "") for title in titles) | frozenset(anchors)


@cache
def texts() -> dict[Path, str]:
    return {
        path: (ROOT / path).read_text()
        for path in project_files()
        if path != HERE and (path.suffix in TEXT or path.name == "Makefile")
    }


@cache
def prose(path: Path) -> str:
    """What people read: all of a page; comments and docstrings of Python."""
    text = texts()[path]
    if path.suffix != ".py":
        return text
    lines = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in lines if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.append(node.value.value)
    return "\n".join(found)


def page_of(citing: Path, cited: str) -> str | None:
    """The page that a citation means: from the root, from the citing page, or the docs' only one of that name."""
    beside = (ROOT / citing.parent / cited).resolve()
    if beside.is_relative_to(ROOT) and beside.relative_to(ROOT).as_posix() in pages():
        return beside.relative_to(ROOT).as_posix()
    if cited in pages():
        return cited
    named = [page for page in pages() if page.startswith("docs/") and page.endswith("/" + cited)]
    return named[0] if len(named) == 1 else None


def test_no_document_outside_the_repository_is_cited() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert not found, "cite docs/methods, or another page of docs/:\n" + "\n".join(found)


def test_cited_pages_and_sections_exist() -> None:
    wrong = []
    for path in texts():
        for cited, anchor, titles in PAGE.findall(prose(path)):
            page = page_of(path, cited)
            if page is None:
                wrong += [f"{path}: {cited}"] * (cited not in NOT_OURS)
                continue
            for section in [*re.findall('"(.+?)"', titles), *filter(None, [anchor])]:
                if section not in sections(page):
                    wrong.append(f"{path}: {cited} has no section {section!r}")
    assert not wrong, "\n".join(wrong)


def test_cited_files_exist() -> None:
    """`longctx/attention/ring.py`, or its end, `attention/ring.py`, is a file of the repository."""
    ours = [f"/{path.as_posix()}" for path in project_files() if path.suffix == ".py"]
    wrong = [
        f"{path}: {cited}"
        for path in texts()
        for cited in SOURCE_FILE.findall(prose(path))
        if cited not in NOT_OURS and not any(file.endswith("/" + cited) for file in ours)
    ]
    assert not wrong, "\n".join(wrong)


def test_cited_names_are_in_their_files() -> None:
    """In "`Overlap` of `longctx/plan/speed.py`" the file has that name."""
    wrong = [
        f"{path}: {file} has no {name}"
        for path in texts()
        for name, file in NAME_IN_FILE.findall(prose(path))
        if not (ROOT / file).is_file() or not re.search(rf"\b{name.split('.')[-1]}\b", (ROOT / file).read_text())
    ]
    assert not wrong, "\n".join(wrong)
