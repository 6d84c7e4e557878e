"""``from clipship.serving import ...``: complete, typed, and free until a name is used."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import clipship.serving
from clipship.serving import AsyncClassifier, Classifier, ClientSettings, errors
from tests.serving.processes import python


def test_the_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(clipship.serving.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {each.names[0].name: each.module for each in block.body if isinstance(each, ast.ImportFrom)}
    lazy = vars(clipship.serving)["_MODULES"]
    assert {name: f"clipship.serving.{module}" for name, module in lazy.items()} == typed
    assert {name: getattr(clipship.serving, name).__module__ for name in lazy} == typed
    assert set(lazy) <= set(dir(clipship.serving))


def test_all_errors_are_there() -> None:
    own = [each for each in vars(errors).values() if inspect.isclass(each) and each.__module__ == errors.__name__]
    assert len(own) > 10
    assert all(getattr(clipship.serving, each.__name__) is each for each in own)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Classifer'"):
        clipship.serving.Classifer  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, clipship.serving; "
        "print([name for name in ('numpy', 'grpc', 'tritonclient', 'PIL', 'click') if name in sys.modules])"
    )
    assert python(program).strip() == "[]"


@pytest.mark.parametrize("client", [Classifier, AsyncClassifier])
def test_both_clients_take_the_same_settings(client: type) -> None:
    parameters = inspect.signature(client).parameters
    assert list(parameters) == ["server", *(field.name for field in fields(ClientSettings))]
    assert {name: each.default for name, each in parameters.items() if name != "server"} == {
        field.name: field.default for field in fields(ClientSettings)
    }
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'"):
        client("127.0.0.1:1", windw=3)
