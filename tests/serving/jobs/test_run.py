"""The verb ``classify`` as a user runs it, on a bundle in its own process and on a real Triton."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipship.core.bundle import Bundle, EncoderVariant, write_manifest
from clipship.core.cli.main import main
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.images.decoding import pixels_from_bytes
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.jobs.inputs import JobImage, inputs_from_arguments
from clipship.serving.jobs.results import names_in
from clipship.serving.jobs.run import Job, JobOutput, JobSummary, run_job, watch_job
from clipship.serving.jobs.shards import Progress, Tally
from clipship.serving.server.process import Server
from tests.serving.bundles import EMBED_DIM, image_encoder_model, jpeg_bytes, reference_answers, write_bundle
from tests.serving.jobs.folders import assert_complete, manifest_of, many_images, write_tar
from tests.serving.processes import CLIPSHIP, ENVIRONMENT
from tests.serving.publish.vocabularies import write_variant


def test_a_summary_counts_one_image_and_one_class_in_the_singular() -> None:
    classes = {f"class {index}": 1 for index in range(11)}
    summary = JobSummary(
        images=11,
        errors=10,
        classes=classes,
        resumed_at=0,
        seconds=1.0,
        images_per_s=11.0,
        bundle_digest="a",
        vocabulary_digest="b",
    )
    assert str(summary).startswith("1 image classified, 10 could not be")
    assert str(replace(summary, errors=0)).startswith("11 images classified")
    assert summary.table().endswith("and 1 more class")


@dataclass(frozen=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def clipship(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process, which spares the second that a new one takes to start."""

    def run(*arguments: object) -> Done:
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def everything(photos: Path, tmp_path: Path) -> list[str]:
    """Inputs of every kind, with bad images among them; 30 + 3 + 4 images."""
    write_tar(tmp_path / "s-000.tar.gz", [("a.jpg", jpeg_bytes(50)), ("a.json", b"{}"), ("b.jpg", b"<html>")], "w:gz")
    write_tar(tmp_path / "s-001.tar", [("c.jpg", jpeg_bytes(51))])
    rows = [{"bytes": jpeg_bytes(60 + number), "path": f"{number}.jpg"} for number in range(3)]
    pq.write_table(pa.table({"image": [*rows, None]}), tmp_path / "hf.parquet")
    return [str(photos), str(tmp_path / "s-{000.tar.gz,001.tar}"), str(tmp_path / "*.parquet")]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in manifest_of(folder)["shards"] for row in pq.read_table(folder / shard["file"]).to_pylist()]


def test_a_job_of_every_kind_of_input(clipship: Run, everything: list[str], bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["classify", *everything, "--bundle", bundle.path, "--out", out, "--shard-size", "10", "--embeddings"]
    done = clipship(*command, "--top-k", "2", "--json")
    assert done.returncode == 1
    assert done.stderr == "clipship: 2 of 37 images could not be classified: see their errors\n"
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["errors"], summary["resumed_at"]) == (37, 2, 0)
    rows = rows_of(out)
    assert [row["path"].removeprefix(f"{tmp_path}/") for row in rows[30:]] == [
        "s-000.tar.gz/a.jpg",
        "s-000.tar.gz/b.jpg",
        "s-001.tar/c.jpg",
        "hf.parquet/0/0.jpg",
        "hf.parquet/1/1.jpg",
        "hf.parquet/2/2.jpg",
        "hf.parquet/3",
    ]
    assert [number for number, row in enumerate(rows) if row["error"] is not None] == [31, 36]
    good = [row for row in rows if row["error"] is None]
    assert {(len(row["labels"]), len(row["scores"]), len(row["indices"]), len(row["embedding"])) for row in good} == {
        (2, 2, 2, EMBED_DIM)
    }
    assert [sum(value * value for value in row["embedding"]) for row in good] == pytest.approx([1.0] * 35)
    counts = {name: sum(row["label"] == name for row in good) for name in {row["label"] for row in good}}
    assert summary["classes"] == counts == manifest_of(out)["classes"]
    assert list(summary["classes"].values()) == sorted(counts.values(), reverse=True)
    again = clipship(*command, "--top-k", "2", "--json")
    assert json.loads(again.stdout)["resumed_at"] == 37
    assert rows_of(out) == rows
    other = clipship(*command, "--top-k", "1")
    assert (other.returncode, "top_k was 2, is 1" in other.stderr) == (2, True)
    anew = clipship(*command, "--top-k", "1", "--restart", "--json")
    assert json.loads(anew.stdout)["resumed_at"] == 0
    assert {len(row["labels"]) for row in rows_of(out) if row["labels"]} == {1}


@pytest.mark.triton
def test_the_same_job_on_a_server_and_in_this_process(
    clipship: Run, everything: list[str], bundle: Bundle, server: Server, tmp_path: Path
) -> None:
    common = ["--embeddings", "--batch-size", "8", "--window", "1", "--json"]
    both = []
    for name, where in (("served", ["--url", server.endpoints.url]), ("local", ["--bundle", bundle.path])):
        done = clipship("classify", *everything, *where, "--out", tmp_path / name, "--format", "parquet", *common)
        assert done.returncode == 1, done.stderr
        both.append((rows_of(tmp_path / name), json.loads(done.stdout)["classes"]))
    served, local = both
    assert served[1] == local[1]
    assert len(served[0]) == 37
    for one, other in zip(served[0], local[0], strict=True):
        for column in ("scores", "embedding"):
            assert one.pop(column) == pytest.approx(other.pop(column), abs=1e-5)
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-5)
        assert one == other


def test_a_list_of_odd_names(bundle: Bundle, tmp_path: Path) -> None:
    names = [b"sp ace.jpg", b"new\nline.jpg", "ü 猫.jpg".encode(), b"caf\xe9.jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(jpeg_bytes(1))
    listed = b"\0".join([*(os.fsencode(tmp_path) + b"/" + name for name in names), b"https://a.example/b.jpg"])
    command = ["classify", "--list", "-", "--bundle", bundle.path, "--out", tmp_path / "out.parquet"]
    arguments = [*CLIPSHIP, *map(str, command)]
    done = subprocess.run(arguments, input=listed, capture_output=True, env=ENVIRONMENT, timeout=120, check=False)
    assert "1 of 5 images could not be classified" in done.stderr.decode()
    found = [name.removeprefix(f"{tmp_path}/") for name in names_in(tmp_path / "out.parquet")]
    assert found == ["sp ace.jpg", "new\nline.jpg", "ü 猫.jpg", "caf\\xe9.jpg", "https://a.example/b.jpg"]


def test_results_on_stdout_are_one_line_an_image(clipship: Run, bundle: Bundle, photos: Path) -> None:
    done = clipship("classify", photos, "--bundle", bundle.path, "--json", "--embeddings", "--top-k", "1")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(rows)) == (0, 30)
    assert {(len(row["labels"]), len(row["embedding"])) for row in rows} == {(1, EMBED_DIM)}
    assert "30 images classified" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-k", "99"], "top k 99: the server reports 1 to"),
        (["--restart"], "give a folder as --out"),
        (["--shard-size", "5", "--out", "a.csv"], "give a folder as --out"),
        (["--out", "a.txt"], "give a name that ends in .parquet, .jsonl, .csv"),
        (["--url", "a:1"], "--bundle runs in this process"),
        (["--header", "a: b"], "--bundle runs in this process"),
        (["--vocabulary", "birds"], "give NAME=BUNDLE"),
        (["--vocabulary", "birds=gone"], "gone: no such folder"),
        (["--precision", "int8"], "no int8 variant of the image encoder: give one of fp32"),
        (["--image-column", "x", "--out", "new", "--shard-size", "0"], "shard size 0"),
    ],
)
def test_options_that_do_not_fit(
    clipship: Run, bundle: Bundle, photos: Path, more: list[str], message: str, tmp_path: Path
) -> None:
    here = [str(tmp_path / text) if text in ("a.csv", "a.txt", "new") else text for text in more]
    done = clipship("classify", photos / "05.jpg", "--bundle", bundle.path, *here)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr
    assert list(tmp_path.glob("*.csv")) == []


def test_the_precision_is_the_servers_own(clipship: Run, photos: Path) -> None:
    done = clipship("classify", photos / "05.jpg", "--url", "127.0.0.1:1", "--precision", "int8")
    assert (done.returncode, "give it to clipship repository, or give --bundle" in done.stderr) == (2, True)


def test_a_variant_of_the_encoder_in_this_process(clipship: Run, photos: Path, tmp_path: Path) -> None:
    """The int8 variant's weights are a little off, so one sees which has run; a job does not go on with another."""
    bundle = write_bundle(tmp_path / "bundle")
    portable = EncoderVariant(file="image_encoder.onnx", precision="fp32", runtime="onnx", opset=18)
    int8 = replace(portable, file="image_encoder.int8.onnx", precision="int8")
    (bundle.path / int8.file).write_bytes(image_encoder_model(rounding=0.02))
    write_manifest(bundle.path, replace(bundle.manifest, image_encoders=(portable, int8)))
    command = ["classify", photos, "--bundle", bundle.path, "--embeddings"]
    runs = (("default", (), 0.0), ("fp32", ("--precision", "fp32"), 0.0), ("int8", ("--precision", "int8"), 0.02))
    for name, more, rounding in runs:
        done = clipship(*command, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        paths, found = zip(*((row["path"], row["embedding"]) for row in rows_of(tmp_path / name)), strict=True)
        pixels = np.stack([pixels_from_bytes(Path(path).read_bytes(), bundle.image_spec) for path in paths])
        expected = reference_answers(pixels, image_encoder_model(rounding=rounding), k=1)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    other = clipship(*command, "--out", tmp_path / "int8")
    assert (other.returncode, "precision was int8, is None" in other.stderr) == (2, True)


def test_a_further_vocabulary_in_this_process(clipship: Run, bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    birds = write_variant(tmp_path / "birds", 1)
    rows = []
    for more in ((), ("--vocabulary", f"birds={birds.path}")):
        done = clipship("classify", photos, "--bundle", bundle.path, *more, "--json")
        assert done.returncode == 0, done.stderr
        rows.append([json.loads(line)["labels"] for line in done.stdout.splitlines()])
    assert len(rows[1]) == 30
    assert {label for labels in rows[0] for label in labels} <= set(bundle.vocabulary.names)
    assert {label for labels in rows[1] for label in labels} <= set(birds.vocabulary.names)
    assert rows[0] != rows[1]
    command = ["classify", photos, "--bundle", bundle.path, "--out", tmp_path / "out", "--json"]
    done = clipship(*command, "--vocabulary", f"birds={birds.path}")
    told = (json.loads(done.stdout)["vocabulary_digest"], manifest_of(tmp_path / "out")["vocabulary_digest"])
    assert told == (birds.vocabulary.digest, birds.vocabulary.digest)
    other = clipship(*command)
    assert (other.returncode, "vocabulary was birds, is None" in other.stderr) == (2, True)


def test_a_header_that_is_none_is_not_repeated(clipship: Run, photos: Path) -> None:
    """It may be a secret."""
    done = clipship("classify", photos / "05.jpg", "--url", "127.0.0.1:1", "--header", "SECRET")
    assert done.returncode == 2
    assert "NAME: VALUE" in done.stderr
    assert "SECRET" not in done.stderr


def test_the_connections_options_reach_it(clipship: Run, photos: Path, tmp_path: Path) -> None:
    """Each is refused by the connection itself, which shows that it got there."""
    (tmp_path / "token").write_text("two words")
    token = ("--token-file", str(tmp_path / "token"))
    for options, message in (
        ((*token, "--tls", "--url", "127.0.0.1:1"), "blanks"),
        ((*token, "--url", "a.example:1"), "plain text"),
        (("--header", "Grpc-X: 1"), "'grpc-x'"),
        (("--tls-ca", str(tmp_path / "gone.pem")), "no such file"),
        (("--tls-cert", str(tmp_path / "token")), "go together"),
        (("--tls-key", str(tmp_path / "token")), "go together"),
        (("--url", "a.example:1", "--url", "b"), "'b' is not the address"),
    ):
        done = clipship("classify", photos / "05.jpg", *options)
        assert (done.returncode, message in done.stderr) == (2, True), (options, done.stderr)


@pytest.fixture
def job(bundle: Bundle) -> Job:
    return Job(Classifier(LocalTransport(bundle, max_batch_size=8)))


def test_rows_keep_their_images(job: Job) -> None:
    """Errors known before, errors met by the client and images, mixed at random."""
    kinds = [number * number % 7 % 3 for number in range(200)]

    def item(number: int) -> JobImage:
        image = {0: jpeg_bytes(number), 1: b"<html>", 2: b""}[kinds[number]]
        return JobImage(name=str(number), image=image, error="known" if kinds[number] == 2 else None)

    expected = job.classifier.classify([jpeg_bytes(number) for number in range(200)])
    tally = Tally()
    for number, (given, result) in enumerate(job.results(item(number) for number in range(200))):
        tally.add(result)
        assert given.name == str(number)
        if kinds[number] == 0:
            assert result.label == expected[number].label
        else:
            assert result.error is not None
            assert (result.error == "known") == (kinds[number] == 2)
    assert (tally.images, tally.errors) == (200, sum(kind > 0 for kind in kinds))


def test_images_are_taken_as_they_are_needed(job: Job) -> None:
    taken = 0

    def items() -> Any:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield JobImage(name=str(number), image=jpeg_bytes(0))

    results = job.results(items())
    next(results)
    assert taken < 500
    results.close()


def test_a_model_that_changes_in_mid_job_is_refused(job: Job, tmp_path: Path) -> None:
    job.validate_server_identity()
    other = LocalTransport(write_bundle(tmp_path / "other", seed=1))
    job.classifier = Classifier(other)
    with pytest.raises(CheckFailed, match="another bundle"):
        job.validate_server_identity()


def test_a_top_k_out_of_range(job: Job) -> None:
    for top_k in (0, 6):
        with pytest.raises(UsageError, match="the server reports 1 to 5"):
            Job(job.classifier, top_k=top_k)


def test_the_summary_shows_the_most_frequent_classes(job: Job) -> None:
    tally = Tally()
    for _, result in job.results(JobImage(name="", image=jpeg_bytes(number)) for number in range(40)):
        tally.add(result)
    summary = job.summary(Progress().after(tally))
    first = summary.table().splitlines()[0]
    name, count = next(iter(summary.classes.items()))
    assert first.split(maxsplit=2) == [str(count), f"{count / 40:.1%}", name]
    assert sum(summary.classes.values()) == 40


def test_a_tar_of_images_goes_through_in_order(clipship: Run, bundle: Bundle, tmp_path: Path) -> None:
    names = many_images(tmp_path / "many.tar", 300)
    done = clipship(
        "classify", tmp_path / "many.tar", "--bundle", bundle.path, "--out", tmp_path / "o", "--shard-size", 64
    )
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "o", names)


def test_a_program_runs_a_job_and_resumes_it(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    output = JobOutput(out=tmp_path / "results", shard_size=8, top_k=2)
    with Classifier(LocalTransport(bundle, max_batch_size=8)) as classifier:
        first = run_job(inputs_from_arguments([str(photos)]), classifier, output)
        again = run_job(inputs_from_arguments([str(photos)]), classifier, output)
        with pytest.raises(UsageError, match="top_k was 2, is 1"):
            run_job(inputs_from_arguments([str(photos)]), classifier, replace(output, top_k=1))
    assert (first.images, first.resumed_at, again.images, again.resumed_at) == (30, 0, 30, 30)
    assert [shard["rows"] for shard in manifest_of(tmp_path / "results")["shards"]] == [8, 8, 8, 6]


def test_a_program_watches_until_it_says_stop(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    out, stop = tmp_path / "results", Event()

    def stop_behind_the_first_shard() -> None:
        while manifest_of(out)["images"] < 30:
            time.sleep(0.02)
        stop.set()

    output = JobOutput(out=out, shard_size=30)
    with Classifier(LocalTransport(bundle, max_batch_size=8)) as classifier:
        Thread(target=stop_behind_the_first_shard, daemon=True).start()
        summary = watch_job([str(photos)], classifier, output, stop=stop, settle_s=0.05)
        assert summary.images == 30 == manifest_of(out)["images"]
        with pytest.raises(UsageError, match="watch was True, is False"):
            run_job(inputs_from_arguments([str(photos)]), classifier, output)
        with pytest.raises(UsageError, match="a watch has no end"):
            watch_job([str(photos)], classifier, JobOutput(out=tmp_path / "out.csv"), stop=stop)


def test_an_unknown_format_is_refused_before_anything_is_classified() -> None:
    with pytest.raises(UsageError, match=r"shard.xml: unknown format: give a name that ends in .parquet, .jsonl, .csv"):
        JobOutput(out=Path("results"), shard_format="xml")
