"""Places that a command cannot use: a deleted folder, a picture without a folder, a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def exits(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    "command", [["check", CONFIG], ["explain", CONFIG], ["plan", CONFIG], ["init"], ["data", "build", CONFIG]]
)
def test_a_deleted_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert exits(command) == 2
    assert capsys.readouterr().err == "the folder in which this command runs was deleted; change to one that exists\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/x.png", "there is no folder"), ("x.txt", "ends in one of .png"), ("folder.png", "cannot be written")],
)
def test_a_picture_that_cannot_be_drawn_is_refused_first(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert exits(["plan", CONFIG, "--sweep", str(tmp_path / name)]) == 2
    caught = capsys.readouterr()
    assert message in caught.err and not caught.out


def test_any_error_of_the_system_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that no command foresaw."""

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "loss.png"))

    monkeypatch.setattr("longctx.train.report.plot.plot_loss", full)
    assert exits(["plot", str(tmp_path)]) == 1
    assert "loss.png: No space left on device; make it available" in capsys.readouterr().err
