"""A crowd that leaves: what its requests still cost a real Triton."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from clipship.serving.bench.requests import encoded_request, pixels_request, validate_answer
from clipship.serving.bench.steps import statistics_of
from clipship.serving.server.process import start_server
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import SIZE_PX, jpeg_bytes

CROWD = 100
SLOW = {
    "preprocess": ("decoded = [", "sum(map(len, batches))"),
    "image_encoder": ("embedding = self.encode(batch)", "len(batch)"),
}
"""Where a model's source sets to work, and on how many images."""


def slow_down(repository: Path, model: str) -> None:
    """Let ``model`` take 0.1 s an image, however many cores there are."""
    source = repository / model / "1" / "model.py"
    line, images = SLOW[model]
    text = source.read_text(encoding="utf-8")
    assert text.count(line) == 1
    text = text.replace(line, f"time.sleep(0.1 * {images}); {line}").replace(
        "import json\n", "import json\nimport time\n"
    )
    source.write_text(text, encoding="utf-8")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("mode", "model"), [("encoded", "preprocess"), ("encoded", "image_encoder"), ("pixels", "image_encoder")]
)
def test_what_a_crowd_leaves_behind_is_not_computed(repository: Path, tmp_path: Path, mode: str, model: str) -> None:
    """In the queue of the slow model it would be: 101 images, 10 seconds of its time."""
    shutil.copytree(repository, tmp_path / "repository")
    slow_down(tmp_path / "repository", model)
    pixels = np.zeros((1, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    request = encoded_request([jpeg_bytes(1)]) if mode == "encoded" else pixels_request(pixels)
    with start_server(tmp_path / "repository") as server:
        transport = TritonTransport(server.endpoints.url)
        before = statistics_of(transport)[model].inference_count
        crowd = [request.sent(transport, 60) for _ in range(CROWD)]
        crowd[0].result()
        for call in crowd:
            call.cancel()
        validate_answer(request, transport, 60)
        assert statistics_of(transport)[model].inference_count - before < CROWD / 2
        transport.close()
