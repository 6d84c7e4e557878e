from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipship.core.bundle import DEFAULT_ENCODER, Bundle
from clipship.core.cli.main import main
from clipship.core.errors import UsageError
from clipship.core.tensorrt_plan import version_parts
from clipship.serving.repository.backends import BACKENDS
from clipship.serving.repository.config_pbtxt import text_from_config
from clipship.serving.repository.models import ModelSettings, configs_from_settings
from clipship.serving.repository.tuning import Tuning
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.container import Ports, compose_file, container_command, gpu_remark, image_for
from clipship.serving.server.releases import (
    RELEASES,
    USUAL_RELEASE,
    needs_of,
    release_for,
    release_of_image,
    release_of_triton,
    validate_release,
)
from clipship.serving.server.server_args import ServerOptions, triton_options
from tests.serving.repository.test_write import FACTS, PLAN

ALLOWS_CODE = "--backend-config=tensorrt,version-compatible=true"


def configured(folder: Path, backend: str, **changes: Any) -> Path:
    """The configurations of a repository; its models' files are not looked at here."""
    facts: ModelSettings = replace(FACTS, **changes)
    for name, config in configs_from_settings(facts, BACKENDS[backend]).items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(text_from_config(config), encoding="utf-8")
    return folder


def install_pillow(folder: Path, version: str, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip writes about a Pillow that needs ``python`` or later, found before the one that is there."""
    metadata = folder / f"pillow-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.4\nName: pillow\nVersion: {version}\nRequires-Python: >={python}\n")
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(autouse=True)
def pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_pillow(tmp_path / "pillow", "13.0.0", "3.11", monkeypatch)


def test_the_table_ascends_and_has_the_usual_release() -> None:
    for values in (
        [release.name for release in RELEASES],
        [version_parts(release.triton) for release in RELEASES],
        [version_parts(release.tensorrt) for release in RELEASES],
        [version_parts(release.onnxruntime) for release in RELEASES],
        [release.opset for release in RELEASES],
    ):
        assert values == sorted(values)
    assert USUAL_RELEASE in {release.name for release in RELEASES}


def form(**changes: Any) -> dict[str, Any]:
    return {"encoder": replace(DEFAULT_ENCODER, **changes)}


def plans(*versions: str, compatible: bool = False, **changes: Any) -> dict[str, Any]:
    each = [replace(PLAN, runtime_version=version, version_compatible=compatible, **changes) for version in versions]
    return {"plans": tuple(each)}


ACCELERATED = {"tuning": Tuning(accelerator="tensorrt")}
CHOICES: list[tuple[str, dict[str, Any], str]] = [
    ("python", {}, "25.08"),
    ("onnxruntime", form(opset=23), "25.08"),
    ("onnxruntime", form(opset=23, precision="int8"), "26.02"),
    ("onnxruntime", form(opset=20, precision="int8"), "25.08"),
    ("onnxruntime", {**form(precision="fp16"), **ACCELERATED}, "25.08"),
    ("onnxruntime", {**form(precision="bf16"), **ACCELERATED}, "26.02"),
    ("onnxruntime", form(precision="bf16"), "25.08"),
    ("tensorrt", plans("10.6.0.26"), "24.11"),
    ("tensorrt", plans("10.8.0.43"), "25.02"),
    ("tensorrt", plans("10.14.1.48"), "25.12"),
    ("tensorrt", plans("11.1.0.106"), "26.07"),
    ("tensorrt", plans("10.9.0.34", compatible=True), "25.08"),
    ("tensorrt", plans("10.14.0.1", compatible=True), "25.12"),
    ("tensorrt", plans("10.9.0.34", "10.14.0.1", compatible=True), "25.12"),
]


@pytest.mark.parametrize(("backend", "changes", "release"), CHOICES)
def test_the_release_that_can_serve_it_is_chosen(
    tmp_path: Path, backend: str, changes: dict[str, Any], release: str
) -> None:
    repository = configured(tmp_path / "r", backend, **changes)
    assert release_for(repository).name == release
    assert image_for(repository) == f"nvcr.io/nvidia/tritonserver:{release}-py3"


def test_a_plain_plan_decides_for_those_beside_it(tmp_path: Path) -> None:
    plain, other = replace(PLAN, runtime_version="10.14.1.48"), replace(PLAN, runtime_version="10.9.0.34")
    both = (replace(other, version_compatible=True, gpus=("sm80",)), plain)
    assert release_for(configured(tmp_path / "r", "tensorrt", plans=both)).name == "25.12"


def test_no_release_is_refused_with_what_each_lacks(tmp_path: Path) -> None:
    old = configured(tmp_path / "old", "tensorrt", **plans("10.5.0.18"))
    with pytest.raises(UsageError) as refused:
        release_for(old)
    assert str(refused.value) == (
        f"{old} needs TensorRT 10.5.0.18 for its plans (release 24.10) and Python 3.11 for Pillow 13.0.0, the "
        "version on this machine (release 24.11 or later), and no known release of NVIDIA's container has it all: "
        "build the plans with the TensorRT of another release or with --version-compatible, or pip install 'pillow<13' "
        "here (client and server need the same Pillow to decode identically), or give an image of your own "
        "with --image"
    )
    unknown = configured(tmp_path / "unknown", "tensorrt", **plans("10.99.0.1"))
    with pytest.raises(UsageError, match=r"TensorRT 10\.99\.0\.1 for its plans \(no known release\)"):
        release_for(unknown)


def test_an_older_pillow_runs_in_an_older_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_pillow(tmp_path / "older", "12.0.0", "3.10", monkeypatch)
    repository = configured(tmp_path / "r", "tensorrt", **plans("10.5.0.18"))
    command = container_command(repository, Ports())
    assert "tritonserver:24.10-py3" in command
    assert " pillow==12.0.0 " in command


def test_a_given_image_that_cannot_serve_it_is_refused(tmp_path: Path) -> None:
    repository = configured(tmp_path / "r", "onnxruntime", **form(opset=23))
    image = "nvcr.io/nvidia/tritonserver:25.05-py3"
    with pytest.raises(UsageError) as refused:
        container_command(repository, Ports(), image=image)
    assert str(refused.value) == (
        f"{image} is release 25.05 (Triton 2.58.0, TensorRT 10.10.0, ONNX Runtime 1.22.0), the repository needs an "
        "ONNX Runtime that takes opset 23 (release 25.08 or later): take such a release, or pack the bundle with "
        "--opset 18 or 20"
    )
    for other in ("example/triton:1", "nvcr.io/nvidia/tritonserver:25.08-py3", "nvcr.io/nvidia/tritonserver:99.01-py3"):
        assert image_for(repository, other) == other
    assert release_of_image("example/triton:25.05-py3") is None


def test_a_triton_says_which_release_it_is(tmp_path: Path) -> None:
    assert release_of_triton(tmp_path) is None
    (tmp_path / "TRITON_VERSION").write_text("2.65.0\n")
    assert release_of_triton(tmp_path) is None, "a release whose TensorRT we do not know"
    (tmp_path / "TRITON_VERSION").write_text("2.60.0\n")
    release = release_of_triton(tmp_path)
    assert release is not None
    assert release.name == "25.08"
    needs = needs_of(configured(tmp_path / "r", "onnxruntime", **form(precision="bf16"), **ACCELERATED))
    with pytest.raises(UsageError, match=r"bfloat16 in the TensorRT accelerator \(release 26.02 or later\).*fp16"):
        validate_release(release, "/opt/tritonserver/bin/tritonserver", needs)


@pytest.mark.parametrize("compatible", [(True,), (False, True), (False,)])
def test_the_code_of_version_compatible_plans_is_allowed_and_of_no_others(
    tmp_path: Path, compatible: tuple[bool, ...]
) -> None:
    each = zip(compatible, ("sm80", "sm89"), strict=False)
    of_gpus = tuple(replace(PLAN, version_compatible=one, gpus=(gpu,)) for one, gpu in each)
    repository = configured(tmp_path / "r", "tensorrt", plans=of_gpus)
    for told in (container_command(repository, Ports()), compose_file(repository, Ports())):
        assert (f" {ALLOWS_CODE}" in told) == any(compatible)
    assert (ALLOWS_CODE in triton_options(ServerOptions(), repository, None)) == any(compatible)


@pytest.mark.parametrize(
    ("backend", "tuning", "gpus", "remark"),
    [
        ("onnxruntime", Tuning(), True, "on a machine without a GPU leave out --gpus=all"),
        ("onnxruntime", Tuning(device="gpu"), True, None),
        ("onnxruntime", Tuning(device="cpu"), False, None),
        ("python", Tuning(), False, None),
    ],
)
def test_the_container_gets_the_gpus_that_the_encoder_takes(
    tmp_path: Path, backend: str, tuning: Tuning, gpus: bool, remark: str | None
) -> None:
    repository = configured(tmp_path / "r", backend, tuning=tuning)
    assert ("--gpus=all" in container_command(repository, Ports()).split()) == gpus
    assert gpu_remark(repository) == remark
    lines = compose_file(repository, Ports()).splitlines()
    deploys = [line for line in lines if line.startswith("    deploy:")]
    told = "    deploy:  # on a machine without a GPU leave out this part"
    assert deploys == ([told if remark else "    deploy:"] if gpus else [])


def test_the_command_line_tells_it(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "r", backend="onnxruntime")
    assert main(["serve", str(repository), "--container"]) == 0
    told = capsys.readouterr()
    assert "--gpus=all" in told.out
    assert told.err == "on a machine without a GPU leave out --gpus=all\n"
