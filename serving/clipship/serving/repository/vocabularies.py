"""Validates names of vocabularies, and that bundles have the same image encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping

from clipship.core.bundle import Bundle, EncoderVariant
from clipship.core.errors import UsageError
from clipship.core.tensorrt_plan import variant_digest

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


def validated_name(name: str) -> str:
    """``name``, validated as part of a model's name.

    Raises:
        UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"vocabulary name {name!r}: give up to 63 lower-case letters, digits, dots, dashes and underscores, "
            "starting with a letter or a digit"
        )
    return name


def validate_same_encoder(bundle: Bundle, others: Mapping[str, Bundle], variant: EncoderVariant) -> None:
    """Validate that all ``others`` have the image encoder that ``bundle`` is served with.

    Raises:
        UsageError: one has another encoder; says what to do.
    """
    served = variant_digest(bundle, variant)
    for name, other in others.items():
        validated_name(name)
        if served not in {variant_digest(other, each) for each in other.image_encoders}:
            raise UsageError(
                f"vocabulary {name}: {other.path} has another image encoder than {bundle.path}: write a separate "
                "repository for it, or create its vocabulary from that bundle with clipship vocab add"
            )
