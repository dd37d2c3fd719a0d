"""Workflows, issue forms and pre-commit hooks parse, and every command they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from house_files import ROOT
from typer.main import get_command

from longctx.cli.main import app

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
NEEDS_ROOT = {"test-multinode"}
FIELDS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def commands(job: dict[str, Any]) -> set[str]:
    """The lines that a job runs, with each value of its matrix put in."""
    lines = {line for step in job["steps"] if "run" in step for line in step["run"].splitlines()}
    for key, values in job.get("strategy", {}).get("matrix", {}).items():
        hole = re.compile(r"\$\{\{\s*matrix\." + key + r"\s*\}\}")
        lines = {hole.sub(str(value), line) for line in lines for value in values}
    return lines


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_make_targets(path: Path) -> None:
    workflow = load(path)
    assert workflow[True], "YAML 1.1 reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and job["runs-on"]
        for line in commands(job):
            made = re.fullmatch(r"make ([a-z-]+)", line)
            assert made and made[1] in TARGETS, f"{line!r} is no target of the Makefile"


def test_every_test_target_runs_somewhere() -> None:
    run = {line for path in WORKFLOWS for job in load(path)["jobs"].values() for line in commands(job)}
    tests = {f"make {name}" for name in TARGETS - NEEDS_ROOT if name == "lint" or re.match("test($|-)", name)}
    assert tests <= run, f"no workflow runs {sorted(tests - run)}"
    script = (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"^make ([a-z-]+)$", script, re.MULTILINE)) == {"test"}  # nightly runs the deep tier


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form(path: Path) -> None:
    form = load(path)
    assert form["name"] and form["description"] and form["labels"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in FIELDS and field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert set(field.get("validations", {})) <= {"required"}


def test_commands_of_longctx_exist() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = "".join(path.read_text() for path in (ROOT / ".github").rglob("*") if path.is_file())
    assert {"doctor", "check"} <= set(re.findall(r"`longctx ([a-z]+)", text)) <= known
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= TARGETS


def test_pre_commit_runs_what_lint_runs() -> None:
    repositories = load(ROOT / ".pre-commit-config.yaml")["repos"]
    (local,) = (repository for repository in repositories if repository["repo"] == "local")
    assert all("rev" in repository for repository in repositories if repository is not local)
    entries = [hook["entry"] for hook in local["hooks"]]
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for tool in ("ruff check", "ruff format", "mypy"):
        assert f"$(BIN)/{tool}" in recipe
        assert any(entry.startswith(f".venv/bin/{tool}") for entry in entries)


def test_addresses_are_those_of_pyproject() -> None:
    import tomllib

    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    links = load(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
    assert all(link["url"].startswith(urls["Homepage"] + "/") for link in links)
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
