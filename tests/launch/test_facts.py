"""The checks of the facts that agents report."""

from __future__ import annotations

from pathlib import Path

from launch_samples import make_spec

from longctx.launch.cluster import facts


def test_what_can_be_wrong_with_a_host(tmp_path: Path) -> None:
    given = make_spec(tmp_path, config_sha256="", config=str(tmp_path / "none"))
    good = facts.gather(given)
    now = good["clock"]
    assert facts.wrong(good, given, 2, 0, now) == []
    cases = {
        "torch is 1.0 there": {"versions": good["versions"] | {"torch": "1.0"}},
        "clock is 100 s ahead": {"clock": now + 100},
        "storage that all hosts share": {"config": "other"},
        "cannot be written": {"writable": False},
        "0.0 GiB free": {"disk": 5},
        "working directory": {"folder": False},
        "it has GPUs": {"gpus": 2},
        "no compiler": {"toolchain": "no compiler"},
    }
    for text, change in cases.items():
        (found,) = facts.wrong(good | change, given, 2, 0, now)
        assert text in found
    assert "1 GPUs for 2 ranks" in facts.wrong(good | {"gpus": 1}, given, 2, 2, now)[0]
