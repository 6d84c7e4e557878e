"""``clipship synthesize`` through the command line's own entry."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clipship.core.cli import main as command_line
from clipship.training.synthetic_set import SyntheticSet

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def synthesize(
    capsys: pytest.CaptureFixture[str], pipeline: Path, model_folder: Path, classes: Path, tmp_path: Path
) -> Command:
    """The verb on small models; returns exit code, stdout and stderr."""
    given = {"--classes": classes, "--out": tmp_path / "out", "--pipeline": pipeline, "--scorer": model_folder}
    small = {"--steps": 2, "--candidates": 3, "--keep": 2, "--device": "cpu", "--duplicates": 1}

    def run(*more: object, recipe: str = "tiny") -> tuple[int, str, str]:
        words: list[object] = ["synthesize", recipe]
        for name, value in {**given, **small}.items():
            words += [] if name in more else [name, value]
        code = command_line.main([str(word) for word in (*words, *more)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_set_is_made_with_every_option(synthesize: Command, tmp_path: Path, data_folder: Path, classes: Path) -> None:
    (tmp_path / "contexts.txt").write_text("in snow\n")
    (tmp_path / "captions.json").write_text(json.dumps({"blue sky": ["nothing but sky"]}))
    code, out, err = synthesize(
        *("--context-file", tmp_path / "contexts.txt", "--prompt-file", tmp_path / "captions.json"),
        *("--template", "the {}.", "--negative-prompt", "dark", "--guidance", 3.5, "--batch-size", 3, "--seed", 5),
        *("--images", data_folder, "--strength", 0.5, "--shots", 2, "--format", "jpeg", "--filter", "similarity"),
        *("--scheduler", "DDPMScheduler", "--size", 16, "--precision", "fp32", "--json"),
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result == {"path": str(tmp_path / "out"), "classes": 3, "candidates": 9, "kept": 6, "fewer": {}}
    made = SyntheticSet.load(tmp_path / "out")
    assert made.images_per_class == 2
    assert {image.prompt for image in made.images} == {"the red in snow.", "the green in snow.", "nothing but sky"}
    image = made.images[0]
    assert (image.negative_prompt, image.guidance, image.scheduler) == ("dark", 3.5, "DDPMScheduler")
    assert (image.source or "").startswith(str(data_folder))
    assert image.path.suffix == ".jpg"
    code, out, err = synthesize("--steps", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "was made with other settings (scheduler DDPMScheduler -> ''; steps 2 -> 4; guidance 3.5 -> 3.0;" in err


def test_a_data_set_gives_names_and_template(synthesize: Command, data_folder: Path, tmp_path: Path) -> None:
    code, out, err = synthesize("--classes", data_folder)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out'}: 10 of 15 images kept, 5 classes; look at {tmp_path / 'out' / 'sheets'}\n"
    code, _, err = synthesize("--classes", data_folder)
    assert (code, err) == (0, f"{tmp_path / 'out'}: is finished already\n")


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("tiney", (), "unknown recipe of synthesis 'tiney': did you mean tiny"),
        ("tiny", ("--pipeline", "absent"), "pipeline absent: no such folder, and no hub id"),
        ("tiny", ("--classes", "absent.txt"), "absent.txt: no such file"),
        ("tiny", ("--keep", "9"), "candidates=3, keep=9: must be at least keep"),
        ("tiny", ("--template", "a photo"), "must be prompts with {} once"),
        ("tiny", ("--scorer", "ViT-B-61"), "unknown model 'ViT-B-61'"),
        ("tiny", ("--device", "abacus"), "give cpu, cuda or cuda:N"),
        ("tiny", ("--prompt-file", "absent.json"), "absent.json: no such file"),
        ("tiny", ("--images", "absent"), "absent: no such folder or file"),
        ("disef", ("--steps", "20"), "starts from real images: give --images DIR"),
        ("tiny", ("--steps", "0"), "0 is not in the range"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    synthesize: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recipe: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = synthesize(*arguments, recipe=recipe)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.glob("out/*"))


def test_recipes_are_listed_with_those_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["synthesis"]) >= {
        "tiny",
        "sync-clip",
        "sus-x",
        "datadream",
        "disef",
        "sdxl-turbo",
        "flux-schnell",
    }
    assert not set(listed["synthesis"]) & {"coop"}
    assert command_line.main(["recipes"]) == 0
    assert "SDXL-Turbo, 512 px: one step" in capsys.readouterr().out


def test_a_missing_diffusers_says_what_to_install(synthesize: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _, err = synthesize()
    assert code == 2
    assert "pip install 'clipship[synthesis]'" in err
