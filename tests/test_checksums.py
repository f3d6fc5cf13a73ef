"""Damage on the disk is found, and named."""

import shutil
from pathlib import Path

import pytest

from selfflow.datasets import checksums
from selfflow.datasets.checksums import verify
from selfflow.datasets.convert import ConvertConfig, convert, main
from selfflow.datasets.spec import UserError


def test_damage_is_named(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(ConvertConfig(str(tmp_path / "out"), str(store)))
    main(ConvertConfig(str(out), verify=True))
    assert "are as they were written" in capsys.readouterr().out
    blob = out / "00000.blob"
    data = bytearray(blob.read_bytes())
    data[-20] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UserError, match=r"00000.blob has another checksum.*episodes 1;"):
        main(ConvertConfig(str(out), verify=True))
    blob.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"has \d+ bytes, not \d+"):
        verify(out)
    blob.unlink()
    with pytest.raises(UserError, match=r"00000\.blob is missing"):
        verify(out)
    (out / checksums.NAME).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        verify(out)


def test_verify_a_recording_without_checksums(store: Path, tmp_path: Path) -> None:
    assert verify(store) > 0
    bad = shutil.copytree(store, tmp_path / "bad")
    data = (bad / "000.blob").read_bytes()
    (bad / "000.blob").write_bytes(bytes(10) + data[10:])
    with pytest.raises(UserError, match="episodes 0"):
        verify(bad)
    with pytest.raises(UserError, match=r"no checksums.json"):
        verify(tmp_path / "nothing")
