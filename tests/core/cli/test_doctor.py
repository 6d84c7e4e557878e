"""``clipship doctor``: what is there is named with its version, what is missing with how to get it."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from clipship.core.cli import doctor
from clipship.core.cli.main import main
from clipship.core.machine.caches import cache_folder
from clipship.core.tables import machine


def test_what_is_installed_is_reported_with_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {one["what"]: one["found"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["torch"] == importlib.metadata.version("torch")
    assert "CPU" in found["ONNX Runtime runs on"]
    assert "Python 3." in found["machine"]
    assert found["processor"] == machine()
    assert found["cache"] == str(cache_folder())


def test_what_is_missing_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2" if name == "onnxruntime-gpu" else None)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--  torch                       missing: pip install 'clipship[training]'" in lines
    assert "--  onnx                        missing: pip install 'clipship[export]'" in lines
    assert "ok  onnxruntime                 1.2" in lines
