"""Where a pipeline's weights lie, from numbers."""

import pytest

from clipship.training.synthesis.image_generator import Placement, placement_of

GIB = 1 << 30
WHOLE, SLICED, OFFLOADED = Placement(), Placement(slicing=True), Placement(slicing=True, offload=True)


@pytest.mark.parametrize(
    ("free_gib", "weights_gib", "batch_size", "size_px", "expected"),
    [
        (None, 50, 64, 1024, WHOLE),  # no card: everything as it is
        (24, 2, 8, 512, WHOLE),  # Stable Diffusion 1.5 on a large card
        (8, 2, 8, 512, SLICED),  # on a small one
        (8, 7, 4, 1024, OFFLOADED),  # SDXL on a small one
        (80, 33, 4, 1024, WHOLE),  # FLUX on a data-centre card
        (40, 33, 4, 1024, SLICED),
        (24, 33, 1, 1024, OFFLOADED),
    ],
)
def test_the_quickest_layout_that_fits(
    free_gib: float | None, weights_gib: float, batch_size: int, size_px: int, expected: Placement
) -> None:
    free = None if free_gib is None else int(free_gib * GIB)
    found = placement_of(free_bytes=free, weights_bytes=int(weights_gib * GIB), batch_size=batch_size, size_px=size_px)
    assert found == expected
