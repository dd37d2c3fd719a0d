"""`longctx plan`: where pictures are written."""

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
