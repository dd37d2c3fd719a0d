"""Nothing inside a checkpoint file runs, and there is no laxer second try."""

from __future__ import annotations

import builtins
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from longctx.errors import CheckpointError
from longctx.train.checkpoint.safe_load import safe_load


class Calls:
    """Unpickles to a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


class WithState:
    def __setstate__(self, state: object) -> None:
        Path(str(state)).touch()

    def __reduce__(self) -> tuple[object, tuple[()], str]:
        return (WithState, (), str(self.__dict__["path"]))


def stateful(trace: Path) -> WithState:
    value = WithState()
    value.__dict__["path"] = trace
    return value


PAYLOADS = {
    "system": lambda trace: Calls(os.system, f"touch {trace}"),
    "eval": lambda trace: Calls(builtins.eval, f"open({str(trace)!r}, 'w')"),
    "exec": lambda trace: Calls(builtins.exec, f"open({str(trace)!r}, 'w')"),
    "open": lambda trace: Calls(open, str(trace), "w"),
    "popen": lambda trace: Calls(subprocess.Popen, ["touch", str(trace)]),
    "import": lambda trace: Calls(builtins.__import__, "antigravity"),
    "getattr": lambda trace: Calls(builtins.getattr, "", "join"),
    "torch.load": lambda trace: Calls(torch.load, str(trace), None, None),
    "state": stateful,
    "nested": lambda trace: {"module": [{"x": (torch.ones(2), [Calls(os.system, f"touch {trace}")])}]},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, kind: str, legacy: bool) -> None:
    trace, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save(PAYLOADS[kind](trace), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="evil.pt: refused"):
        safe_load(path)
    assert not trace.exists()


def opcodes(trace: Path) -> bytes:
    return b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."


def test_handmade_containers_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    raw = tmp_path / "raw.pt"
    raw.write_bytes(opcodes(trace))
    zipped = tmp_path / "zip.pt"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", opcodes(trace))
        archive.writestr("archive/version", "3")
    tarred = tmp_path / "tar.pt"
    with tarfile.open(tarred, "w") as bundle:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = opcodes(trace)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            bundle.addfile(entry, io.BytesIO(data))
    for path in (raw, zipped, tarred):
        with pytest.raises(CheckpointError, match=path.name):
            safe_load(path)
    assert not trace.exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.arange(1000)}, path)
    data = path.read_bytes()
    for damaged in (b"", data[:100], data[: len(data) // 2], b"\0" * 500):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            safe_load(path)
    with pytest.raises(CheckpointError, match=r"absent\.pt"):
        safe_load(tmp_path / "absent.pt")


def test_plain_data_is_read(tmp_path: Path) -> None:
    value = {"x": torch.arange(5), "n": [1, 2.0, "three", None, True], "t": (torch.float32, torch.Size([2]))}
    torch.save(value, tmp_path / "a.pt")
    found = safe_load(tmp_path / "a.pt")
    assert torch.equal(found.pop("x"), torch.arange(5)) and found == {k: v for k, v in value.items() if k != "x"}


def test_the_source_has_no_unsafe_read() -> None:
    folder = Path(__file__).parents[2] / "longctx"
    for path in folder.rglob("*.py"):
        text = path.read_text()
        unsafe = ("import pickle", "weights_only=False", "pickle.load")
        assert not any(word in text for word in unsafe), f"{path} reads with pickle"
        assert text.count("torch.load(") == text.count("weights_only=True"), f"{path}: torch.load without weights_only"
