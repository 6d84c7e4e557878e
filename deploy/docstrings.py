"""For the API reference: docstrings in reStructuredText's spelling become Markdown.

``mkdocs.yml`` names this file as an extension of griffe, which reads the docstrings of the site.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|data|exc|func|meth|mod):`~?([^`]+)`")
_LITERAL_BLOCK = re.compile(r"^::\n", re.MULTILINE)


def markdown_from_docstring(text: str) -> str:
    """``text`` without the two spellings of ours that Markdown does not have: roles, and ``::`` before a drawing."""
    return _LITERAL_BLOCK.sub("", _ROLE.sub(r"`\1`", text))


class Docstrings(griffe.Extension):
    """Called for every object that griffe reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = markdown_from_docstring(obj.docstring.value)
