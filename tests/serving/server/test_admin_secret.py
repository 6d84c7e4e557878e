"""The admin secret's file, as a client reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipship.core.errors import UsageError
from clipship.serving.server.admin_secret import read_secret


def test_a_missing_file_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as missing:
        read_secret(tmp_path / "secret")
    assert str(missing.value).count(str(tmp_path)) == 1
    assert "(No such file or directory)" in str(missing.value)


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not ASCII text"):
        read_secret(tmp_path / "secret")
