"""A run on weighted sources resumes to the bit, ends where `data.exhausted: stop` says, and reports the shares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import config, losses, weights, write

from distributed import RankFailure, run_ranks


def train(rank: int, world: int, folder: str, overrides: tuple[str, ...]) -> int:
    from longctx.train.run import run

    return run(config(Path(folder), *overrides))


@pytest.mark.deep
def test_resumed_to_the_bit_and_stopped(tmp_path: Path) -> None:
    write(tmp_path)
    rows = [{"prompt": f"{number} times two is", "completion": f" {2 * number}\n"} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = f"{{path: {tmp_path / 'text'}, weight: 3}}, {{path: {tmp_path / 'pairs.jsonl'}}}"
    settings = (f"data.sources=[{both}]", "output.sample_tokens=0", "train.global_batch=2")
    assert run_ranks(2, train, str(tmp_path), settings, timeout=280) == [0, 0]
    output = tmp_path / "run"
    first = losses(output), weights(output)
    summary = json.loads((output / "summary.json").read_text())
    assert [source["samples"] for source in summary["mixture"]] in ([9, 3], [8, 4], [10, 2])
    assert summary["mixture"][0]["source"] == str(tmp_path / "text") and summary["mixture"][0]["epochs"] > 0
    assert summary["data"]["conversations"] == 40 and summary["data"]["ignored_tokens"] > 40

    shutil.rmtree(output / "checkpoints" / "step-00000006")
    assert run_ranks(2, train, str(tmp_path), (*settings, "checkpoint.resume=must"), timeout=280) == [0, 0]
    assert losses(output) == first[0] and len(first[0]) == 6
    assert all((value == weights(output)[name]).all() for name, value in first[1].items())

    with pytest.raises(RankFailure, match="data"):  # other shares are other data
        run_ranks(2, train, str(tmp_path), (*settings, "data.weights=[1, 1]"), timeout=280)
    shutil.rmtree(output)
    stop = ("data.exhausted=stop", "train.steps=1000", "train.global_batch=4")
    assert run_ranks(2, train, str(tmp_path), (*settings, *stop), timeout=280) == [0, 0]
    summary = json.loads((output / "summary.json").read_text())
    assert 0 < summary["step"] == summary["steps"] < 1000 and summary["status"] == "completed"
    assert max(source["epochs"] for source in summary["mixture"]) <= 1
