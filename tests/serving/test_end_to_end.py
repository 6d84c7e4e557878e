"""A real Triton, compared with ONNX Runtime in this process."""

from __future__ import annotations

import io
import json
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipship.core.bundle import Bundle
from clipship.core.images.decoding import ImageDecodeError, pixels_from_bytes
from clipship.core.tensors import ENCODED, ERROR
from clipship.serving import Classifier, Result
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.errors import DeadlineExceeded, ModelsMissing, RequestRejected, ServerOverloaded
from clipship.serving.jobs.inputs import inputs_from_arguments
from clipship.serving.repository.config_pbtxt import config_from_text, text_from_config
from clipship.serving.server.process import Server, start_server
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import NAMES, SIZE_PX, SPEC, image_encoder_model, jpeg_bytes, reference_answers
from tests.serving.processes import clipship, frozen

pytestmark = pytest.mark.triton

K = 5


def image_paths(given: list[str]) -> list[Path]:
    return [Path(found.path) for found in inputs_from_arguments(given).files()]


@pytest.fixture(scope="module")
def transport(server: Server) -> Iterator[TritonTransport]:
    connection = TritonTransport(server.endpoints.url)
    yield connection
    connection.close()


def infer(transport: TritonTransport, model: str, inputs: dict[str, Any], outputs: list[str]) -> Any:
    return transport.infer(model, inputs, outputs, timeout_s=30).result()


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, size=(height, width, channels), dtype=np.uint8)
    return Image.fromarray(array, {3: "RGB", 4: "RGBA"}[channels]) if channels > 1 else Image.fromarray(array[..., 0])


def png_with_a_huge_header() -> bytes:
    """A PNG that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def images() -> dict[str, bytes]:
    """Files of every kind that meets a classifier."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right
    grey16 = Image.fromarray(np.random.default_rng(3).integers(0, 65536, size=(40, 50), dtype=np.uint16))
    frames = [noise(50, 40, seed=seed).quantize(32) for seed in range(3)]
    jpeg = jpeg_bytes(4, width=120, height=90)
    return {
        "jpeg": jpeg,
        "progressive jpeg": encoded(noise(64, 48), "JPEG", progressive=True),
        "rotated by exif": encoded(noise(90, 60), "JPEG", exif=exif),
        "cmyk jpeg": encoded(noise(60, 50).convert("CMYK"), "JPEG"),
        "grey jpeg": encoded(noise(60, 50).convert("L"), "JPEG"),
        "16-bit grey png": encoded(grey16, "PNG"),
        "palette png": encoded(noise(70, 50).quantize(16), "PNG"),
        "transparent png": encoded(noise(50, 70, channels=4), "PNG"),
        "one-bit png": encoded(noise(50, 70).convert("1"), "PNG"),
        "animated gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": encoded(noise(80, 64), "WEBP"),
        "bmp": encoded(noise(33, 35), "BMP"),
        "tiff": encoded(noise(64, 40), "TIFF"),
        "1 x 1": encoded(noise(1, 1), "PNG"),
        "20000 wide": encoded(noise(20_000, 16), "PNG"),
        "3 x 5000": encoded(noise(3, 5000), "PNG"),
        "exactly the input's size": encoded(noise(SIZE_PX, SIZE_PX), "PNG"),
        "zero bytes": b"",
        "text": b"not an image at all",
        "zeros": bytes(5000),
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "truncated png": encoded(noise(64, 48), "PNG")[:-2000],
        "corrupt jpeg header": b"\xff\xd8" + jpeg[60:],
        "huge header": png_with_a_huge_header(),
        "float tiff": encoded(Image.fromarray(np.zeros((9, 9), dtype=np.float32)), "TIFF"),
    }


def test_the_server_preprocesses_as_the_client_bit_for_bit(transport: TritonTransport) -> None:
    files = images()
    pixels, errors = [], []
    for name, data in files.items():
        outputs = infer(
            transport, "preprocess", {ENCODED.name: np.array([[data]], dtype=np.object_)}, ["image", ERROR.name]
        )
        pixels.append(outputs["image"][0])
        errors.append(outputs[ERROR.name][0, 0].decode())
        assert outputs["image"].shape == (1, SIZE_PX, SIZE_PX, 3), name
    for (name, data), array, error in zip(files.items(), pixels, errors, strict=True):
        try:
            expected, message = pixels_from_bytes(data, SPEC), ""
        except ImageDecodeError as caught:
            expected, message = np.zeros((SIZE_PX, SIZE_PX, 3), dtype=np.uint8), str(caught)
        assert (array == expected).all(), name
        assert without_addresses(error) == without_addresses(message), name
    assert sum(not error for error in errors) == 17


def without_addresses(message: str) -> str:
    """Pillow's messages hold objects' addresses in memory."""
    return message.partition(" at 0x")[0]


def test_a_batch_mixes_good_and_bad_images(transport: TritonTransport) -> None:
    elements = [jpeg_bytes(0), b"", jpeg_bytes(1), b"x", jpeg_bytes(2)]
    batch = np.array(elements, dtype=np.object_).reshape(-1, 1)
    outputs = infer(transport, "preprocess", {ENCODED.name: batch}, ["image", ERROR.name])
    assert [bool(error) for error in outputs[ERROR.name][:, 0]] == [False, True, False, True, False]
    assert not outputs["image"][[1, 3]].any()
    for row in (0, 2, 4):
        assert (outputs["image"][row] == pixels_from_bytes(elements[row], SPEC)).all()


@pytest.mark.parametrize("decode", ["client", "server"])
def test_results_equal_onnx_runtime_in_this_process(
    server: Server, photos: Path, decode: Literal["client", "server"]
) -> None:
    paths = image_paths([str(photos)])
    assert len(paths) == 30
    with Classifier(server.endpoints.url, decode=decode, window=3) as classifier:
        results = classifier.classify(paths)
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), SPEC) for path in paths])
    _, scores, indices = reference_answers(pixels, image_encoder_model(), K)
    assert [result.indices for result in results] == [tuple(row) for row in indices.tolist()]
    assert [result.labels for result in results] == [tuple(NAMES[index] for index in row) for row in indices]
    np.testing.assert_allclose([result.scores for result in results], scores, rtol=2e-5, atol=1e-8)
    assert len({result.label for result in results}) > 2, "all images look alike: the comparison shows nothing"


def test_results_are_those_of_the_same_graphs_in_this_process(server: Server, bundle: Bundle, photos: Path) -> None:
    """Alone on the server, batches are the same, and then the numbers are, to the last bit."""
    paths = image_paths([str(photos)])
    with Classifier(LocalTransport(bundle, max_batch_size=8)) as local:
        expected = local.classify(paths)
    with Classifier(server.endpoints.url, window=1) as served:
        assert served.classify(paths) == expected


def test_both_ways_of_decoding_give_the_very_same_results(server: Server, photos: Path) -> None:
    data = [*images().values(), *(path.read_bytes() for path in image_paths([str(photos)]))]
    both = []
    for decode in ("client", "server"):
        with Classifier(server.endpoints.url, decode=decode, batch_size=1) as classifier:
            both.append([comparable(result) for result in classifier.classify(data)])
    assert both[0] == both[1]
    assert sum(result.error is not None for result in both[0]) == 8


def comparable(result: Result) -> Result:
    return Result(error=without_addresses(result.error)) if result.error is not None else result


def test_golden_samples_of_the_bundle(transport: TritonTransport, bundle: Bundle) -> None:
    golden = bundle.golden()
    outputs = infer(transport, "classify", {"image": golden.pixels}, ["scores", "indices", "labels"])
    np.testing.assert_array_equal(outputs["indices"], golden.indices)
    np.testing.assert_allclose(outputs["scores"], golden.scores, rtol=2e-5, atol=1e-8)
    embedding = infer(transport, "embed", {"image": golden.pixels}, ["embedding"])["embedding"]
    np.testing.assert_allclose(embedding, golden.embedding, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)


def test_many_clients_at_once_get_their_own_answers(server: Server) -> None:
    """Triton puts their requests into common batches; each must get its own rows."""
    before = set(threading.enumerate())
    pixels = np.stack([pixels_from_bytes(jpeg_bytes(seed), SPEC) for seed in range(40)])
    _, _, indices = reference_answers(pixels, image_encoder_model(), K)
    with Classifier(server.endpoints.url, window=8, batch_size=3) as classifier, ThreadPoolExecutor(6) as pool:
        starts = list(range(0, 36, 6))
        answers = pool.map(lambda start: classifier.classify(pixels[start:]), starts)
        for start, results in zip(starts, answers, strict=True):
            assert [result.indices for result in results] == [tuple(row) for row in indices[start:].tolist()]
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("clipship-load")]


def test_what_the_server_refuses(server: Server, transport: TritonTransport) -> None:
    wrong = np.zeros((1, SIZE_PX, SIZE_PX + 1, 3), dtype=np.uint8)
    with pytest.raises(RequestRejected, match="unexpected shape"):
        infer(transport, "classify", {"image": wrong}, ["scores"])
    too_many = np.zeros((9, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    with pytest.raises(RequestRejected, match="batch-size must be <= 8"):
        infer(transport, "classify", {"image": too_many}, ["scores"])
    with pytest.raises(ModelsMissing):
        infer(transport, "nobody", {"image": too_many}, ["scores"])
    with pytest.raises(ModelsMissing):
        transport.model_config("nobody")
    with frozen(server), pytest.raises(DeadlineExceeded):
        transport.infer("classify", {"image": too_many[:8]}, ["scores"], timeout_s=0.2).result()


def test_the_command_line_classifies_a_folder(server: Server, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.parquet"
    done = clipship("classify", photos, "--url", server.endpoints.url, "--out", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["errors"]) == (30, 0)
    table = pq.read_table(out)
    assert table.column("path").to_pylist() == [str(path) for path in image_paths([str(photos)])]
    assert table.schema.metadata[b"clipship.bundle_digest"].decode() == summary["bundle_digest"]
    with Classifier(server.endpoints.url) as classifier:
        expected = [result.label for result in classifier.classify(image_paths([str(photos)]))]
    assert table.column("label").to_pylist() == expected


@pytest.mark.parametrize("decode", ["client", "server"])
def test_bad_images_are_rows_and_exit_code_1(server: Server, tmp_path: Path, decode: str) -> None:
    files = {"a.jpg": jpeg_bytes(0), "b.jpg": b"", "c.jpg": jpeg_bytes(1)[:-300], "d.jpg": jpeg_bytes(2)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    out = tmp_path / "results.jsonl"
    done = clipship("classify", tmp_path, "--url", server.endpoints.url, "--out", out, "--decode", decode)
    assert done.returncode == 1
    assert "2 of 4 images could not be classified" in done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["label"] is None for row in rows] == [False, True, True, False]
    assert [bool(row["error"]) for row in rows] == [False, True, True, False]


def test_results_on_stdout(server: Server, photos: Path) -> None:
    table = clipship("classify", photos / "05.jpg", "--url", server.endpoints.url)
    lines = clipship("classify", photos / "05.jpg", "--url", server.endpoints.url, "--json")
    assert table.returncode == lines.returncode == 0
    row = json.loads(lines.stdout)
    assert table.stdout == f"{row['score']:6.4f}  {row['label']}  {photos / '05.jpg'}\n"
    assert "1 image classified" in lines.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(server: Server, photos: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(60 * 1024))
    for suffix in ("parquet", "jsonl", "csv"):
        done = clipship("classify", photos, "--url", server.endpoints.url, "--out", small_disk / f"out.{suffix}")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "no space left" in done.stderr.lower()
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_no_server_is_one_line(photos: Path, tmp_path: Path) -> None:
    done = clipship("classify", photos, "--url", "127.0.0.1:1", "--out", tmp_path / "out.csv")
    assert done.returncode == 1
    assert done.stderr.startswith("clipship: no Triton answers at 127.0.0.1:1")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_crowded_server_answers_everybody_in_the_end(repository: Path, tmp_path: Path) -> None:
    """With room for one waiting request most are turned away, and come again."""
    crowded = Path(shutil.copytree(repository, tmp_path / "repository"))
    path = crowded / "image_encoder" / "config.pbtxt"
    config = config_from_text(path.read_text(encoding="utf-8"))
    config.dynamic_batching.default_queue_policy.max_queue_size = 1
    path.write_text(text_from_config(config), encoding="utf-8")
    pixels = np.stack([pixels_from_bytes(jpeg_bytes(seed % 10), SPEC) for seed in range(400)])
    with start_server(crowded) as running:
        connection = TritonTransport(running.endpoints.url)
        flood = [connection.infer("embed", {"image": pixels[:8]}, ["embedding"], timeout_s=30) for _ in range(200)]
        assert {type(future.exception()) for future in flood} == {type(None), ServerOverloaded}
        connection.close()
        with Classifier(running.endpoints.url, window=16) as classifier:
            results = classifier.classify(pixels)
    _, _, indices = reference_answers(pixels, image_encoder_model(), K)
    assert [result.indices for result in results] == [tuple(row) for row in indices.tolist()]


def test_a_stream_survives_the_servers_restart(repository: Path) -> None:
    pixels = np.stack([pixels_from_bytes(jpeg_bytes(seed), SPEC) for seed in range(40)])
    with start_server(repository) as first:
        port = first.endpoints.grpc_port
        classifier = Classifier(first.endpoints.url, window=1)
        results = classifier.classify_iter(pixels)
        taken = [next(results)]
    with start_server(repository, grpc_port=port):
        taken += results
    classifier.close()
    _, _, indices = reference_answers(pixels, image_encoder_model(), K)
    assert [result.indices for result in taken] == [tuple(row) for row in indices.tolist()]
