from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.core.images import files
from clipship.serving.jobs.inputs import Inputs, JobImage, inputs_from_arguments
from tests.serving.jobs.folders import write_tar


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def paths(*arguments: str) -> list[str]:
    return [found.path for found in inputs_from_arguments(arguments).files()]


def names(inputs: Inputs) -> list[str]:
    return [item.name for item in inputs.images()]


def test_folders_are_searched_by_the_order_of_names(here: Path) -> None:
    touch(here, "p/b.jpg", "p/a.PNG", "p/sub/c.webp", "p/notes.txt", "p/odd.dat", "p/.hidden/d.gif", "p/sub.jpg")
    inside = ["p/.hidden/d.gif", "p/a.PNG", "p/b.jpg", "p/sub/c.webp", "p/sub.jpg"]
    assert paths("p") == paths("p/") == paths("./p") == inside
    assert paths(str(here / "p")) == [str(here / path) for path in inside]
    os.chdir(here / "p")
    assert paths(".") == [path.removeprefix("p/") for path in inside]


@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_a_large_folder_is_listed_in_parts(here: Path, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(files, "_NAMES_AT_ONCE", together)
    expected = sorted(f"{hashlib.sha256(bytes([number])).hexdigest()[:8]}.jpg" for number in range(8))
    touch(here, *(f"p/{name}" for name in expected), "p/zz/last.jpg")
    assert paths("p") == [*(f"p/{name}" for name in expected), "p/zz/last.jpg"]


def test_globs(here: Path) -> None:
    touch(here, "p/a.jpg", "p/b.dat", "p/.c.jpg", "p/s1/d.jpg", "p/s1/e.txt", "p/s2/deep/f.jpg", "p/[x].jpg")
    assert paths("p/*.jpg") == ["p/[x].jpg", "p/a.jpg"]
    assert paths("p/?.*") == ["p/a.jpg", "p/b.dat"], "what a glob names is taken, whatever it is called"
    assert paths("p/s*") == ["p/s1/d.jpg", "p/s2/deep/f.jpg"], "folders that match are searched for images"
    assert paths("p/**/*.jpg") == ["p/[x].jpg", "p/a.jpg", "p/s1/d.jpg", "p/s2/deep/f.jpg"]
    assert paths("p/**/deep") == paths("p/**/deep/*") == paths("**/f.jpg") == ["p/s2/deep/f.jpg"]
    assert paths("p/.*.jpg") == ["p/.c.jpg"]
    assert paths("p/[x].jpg") == ["p/[x].jpg"], "a file is itself before it is a glob"
    assert paths(f"{here}/*/a.*") == [f"{here}/p/a.jpg"]


def test_an_image_that_several_inputs_name_comes_once(here: Path) -> None:
    touch(here, "p/a.jpg", "p/b.jpg", "p/odd.dat", "p/.h.jpg", "p/sub/c.jpg")
    everything = ["p/.h.jpg", "p/a.jpg", "p/b.jpg", "p/sub/c.jpg"]
    assert paths("p", "p") == paths("p", "p/sub", "./p/a.jpg", str(here / "p/b.jpg")) == everything
    assert paths("p/b.jpg", "p") == ["p/b.jpg", "p/.h.jpg", "p/a.jpg", "p/sub/c.jpg"]
    assert paths("p/*.jpg", "p/b.jpg", "p") == ["p/a.jpg", "p/b.jpg", "p/.h.jpg", "p/sub/c.jpg"]
    assert paths("p/sub", "p/**/*.jpg") == ["p/sub/c.jpg", "p/a.jpg", "p/b.jpg"]
    assert paths("p", "p/odd.dat") == [*everything, "p/odd.dat"], "a folder does not name what is no image"


def test_links_that_go_round(here: Path) -> None:
    touch(here, "p/a.jpg", "elsewhere/b.jpg")
    (here / "p" / "loop").symlink_to(here / "p")
    (here / "p" / "self.jpg").symlink_to("self.jpg")
    (here / "p" / "there").symlink_to(here / "elsewhere")
    (here / "elsewhere" / "back").symlink_to(here / "p")
    (here / "p" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(here / "p" / "pipe.jpg")
    expected = ["p/a.jpg", "p/gone.jpg", "p/self.jpg", "p/there/b.jpg"]
    assert paths("p") == paths("p/**/*.jpg") == expected, (
        "every folder once; links to nothing are told by who reads them"
    )


def test_names_of_every_kind(here: Path) -> None:
    raw = [b"sp ace.jpg", b"new\nline.jpg", "ü 猫.jpg".encode(), b"caf\xe9.jpg", b"-dash.jpg", b"{a,b}.jpg"]
    (here / "p").mkdir()
    for name in raw:
        Path(os.fsdecode(b"p/" + name)).touch()
    assert sorted(map(os.fsencode, paths("p"))) == sorted(b"p/" + name for name in raw)
    assert "p/caf\\xe9.jpg" in names(inputs_from_arguments(["p"]))
    Path("list0").write_bytes(b"\0".join(b"p/" + name for name in raw))
    assert [os.fsencode(path) for path in paths("@list0")] == [b"p/" + name for name in raw]


def test_a_folder_that_cannot_be_searched_is_a_row(here: Path) -> None:
    touch(here, "p/a.jpg", "p/z.jpg")
    long = "n" * 200
    os.chdir(here / "p")
    for _ in range(25):  # deeper than a path may be long
        os.mkdir(long)
        os.chdir(long)
    os.chdir(here)
    first, middle, last = inputs_from_arguments(["p"]).images()
    assert (first.name, last.name) == ("p/a.jpg", "p/z.jpg")
    assert middle.error == "cannot be searched: File name too long"


def test_lists(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(here, "a.jpg", "b c.jpg", "@at.jpg")
    Path("list.txt").write_bytes(b"b c.jpg\r\n\ngone.jpg\na.jpg\na.jpg")
    expected = ["b c.jpg", "gone.jpg", "a.jpg", "a.jpg"]
    assert (
        paths("@list.txt") == [item.path for item in inputs_from_arguments([], lists=["list.txt"]).files()] == expected
    )
    assert paths("@at.jpg") == ["@at.jpg"], "a file of that name is itself"
    with Path("list.txt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert [found.path for found in inputs_from_arguments([], lists=["-"]).files()] == expected
    Path("long.txt").write_text("".join(f"{number:0100d}.jpg\n" for number in range(5000)))
    assert [len(path) for path in paths("@long.txt")] == [104] * 5000, "lines across what is read at once"


def test_addresses_in_a_list_are_rows(here: Path) -> None:
    Path("list.txt").write_text("http://a.example/b.jpg\n")
    (item,) = inputs_from_arguments(["@list.txt"]).images()
    assert item.error is not None
    assert "addresses are not fetched" in item.error


def test_numbered_names_in_braces(here: Path) -> None:
    touch(here, "a-08.jpg", "a-09.jpg", "a-10.jpg", "b-9.jpg", "b-10.jpg", "b-x.jpg")
    assert paths("a-{08..10}.jpg") == ["a-08.jpg", "a-09.jpg", "a-10.jpg"]
    assert paths("{a-10,b-x}.jpg", "b-{9..10}.jpg") == ["a-10.jpg", "b-x.jpg", "b-9.jpg", "b-10.jpg"]
    with pytest.raises(DataError, match=r"a-11\.jpg: no such file"):
        paths("a-{08..11}.jpg")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no images were given"),
        (["gone.jpg"], r"gone\.jpg: no such file or folder"),
        (["*.jpg"], r"\*\.jpg: nothing matches"),
        (["full", "empty"], "empty: no images in this folder"),
        (["@gone"], "gone: no such list"),
        (["s3://bucket/a.jpg"], "addresses are not fetched"),
    ],
)
def test_what_is_not_there_is_told_before_the_job(here: Path, given: list[str], message: str) -> None:
    touch(here, "full/a.jpg", "empty/notes.txt")
    with pytest.raises(DataError, match=message):
        inputs_from_arguments(given)


@pytest.fixture
def mixed(here: Path) -> Inputs:
    """Folders, files, archives of several images, of one and of none."""
    touch(here, "p/a.jpg", "p/b.jpg", "q/z.jpg")
    for name, count in (("1.tar", 3), ("2.tar", 0), ("3.tar", 1)):
        write_tar(here / name, ((f"{number}.jpg", b"x") for number in range(count)))
    return inputs_from_arguments(["p", "[12].tar", "3.tar", "q"])


def test_a_job_goes_on_behind_every_image(mixed: Inputs) -> None:
    items = list(mixed.images())
    assert [item.name for item in items] == [
        "p/a.jpg",
        "p/b.jpg",
        "1.tar/0.jpg",
        "1.tar/1.jpg",
        "1.tar/2.jpg",
        "2.tar",
        "3.tar/0.jpg",
        "q/z.jpg",
    ]
    for number, item in enumerate(items):
        assert list(mixed.images(item.place)) == items[number + 1 :]


CHANGES: dict[str, Callable[[], object]] = {
    "a file came before": lambda: touch(Path(), "p/0.jpg"),
    "a file went": lambda: Path("p/a.jpg").unlink(),
    "an archive was written again": lambda: write_tar(Path("1.tar"), [("0.jpg", b"xy")]),
    "an archive went": lambda: Path("1.tar").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_are_refused(mixed: Inputs, change: str) -> None:
    place = list(mixed.images())[4].place
    CHANGES[change]()
    with pytest.raises(DataError, match="--restart"):
        list(mixed.images(place))


def test_fewer_inputs_are_refused_and_more_at_the_end_are_not(mixed: Inputs) -> None:
    items = list(mixed.images())
    fewer = inputs_from_arguments(["p"])
    with pytest.raises(DataError, match="have 2 files, at least 5 before"):
        list(fewer.images(items[6].place))
    touch(Path(), "q/zz.jpg")
    assert [item.name for item in mixed.images(items[-1].place)] == ["q/zz.jpg"]


def test_the_total_is_told_where_it_costs_nothing(mixed: Inputs) -> None:
    assert inputs_from_arguments(["p/a.jpg", "q/z.jpg"]).total() == 2
    for unknown in (["p"], ["1.tar"], ["p/*.jpg"]):
        assert inputs_from_arguments(unknown).total() is None


def test_the_first_images_of_a_very_large_folder_come_at_once(here: Path) -> None:
    """Nothing is listed that is not needed: the second folder is never opened."""
    touch(here, "p/a/1.jpg", "p/b/2.jpg")
    items = inputs_from_arguments(["p"]).images()
    assert isinstance(next(items), JobImage)
    (here / "p" / "b" / "2.jpg").rename(here / "p" / "b" / "3.jpg")
    assert next(items).name == "p/b/3.jpg"
