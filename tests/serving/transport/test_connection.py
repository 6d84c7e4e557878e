"""What a connection accepts, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipship.core.errors import UsageError
from clipship.serving.transport.connection import Connection, connection_from_text, is_loopback


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("127.0.0.1:8001", ("127.0.0.1:8001",)),
        ("grpc://a.example:1,b.example:2", ("a.example:1", "b.example:2")),
        (" a:1 , a:1 ", ("a:1",)),
        ("[::1]:8001", ("[::1]:8001",)),
        ("unix:/run/triton.sock", ("unix:/run/triton.sock",)),
    ],
)
def test_addresses(text: str, addresses: tuple[str, ...]) -> None:
    assert connection_from_text(text).addresses == addresses


@pytest.mark.parametrize("text", ["", "host", "host:", ":8001", "http://host:8000", "host:8001/v2", "a:1,,b:2"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="give HOST:PORT"):
        connection_from_text(text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"urls": "a:1"}, "give a tuple"),
        ({"urls": ()}, "at least one"),
        ({"compression": "zip"}, "give none, gzip or deflate"),
        ({"max_message_bytes": 2**31}, "at most 2147483647 bytes"),
        ({"connect_timeout_s": 0.0}, "positive"),
        ({"certificate_file": Path(__file__)}, "go together"),
        ({"server_name": "triton.test"}, "under TLS only"),
        ({"ca_file": Path("gone.pem")}, "gone.pem: no such file"),
        ({"token": "a", "token_file": Path(__file__)}, "give one"),
        ({"headers": {"X-Team": "a"}}, "lower-case"),
        ({"headers": {"grpc-timeout": "1"}}, "lower-case"),
        ({"headers": {"x-team": "a\nb"}}, "printable ASCII"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Connection(**{"urls": ("127.0.0.1:1",), **settings})


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "naïve"])
def test_a_bad_token_is_not_repeated(token: str) -> None:
    with pytest.raises(UsageError, match="the token is empty or has blanks") as caught:
        Connection(urls=("127.0.0.1:1",), token=token)
    assert not token or token not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    connection = Connection(urls=("localhost:1",), token="s3cret", headers={"x-key": "k3y"})
    assert "s3cret" not in repr(connection)
    assert "k3y" not in repr(connection)


@pytest.mark.parametrize(
    "secret",
    [{"token": "s3cret"}, {"headers": {"authorization": "Basic s3cret"}}, {"headers": {"x-api-key": "s3cret"}}],
)
def test_secrets_do_not_travel_in_plain_text_unless_asked_for(secret: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"would travel to far\.example:1 in plain text") as caught:
        Connection(urls=("localhost:1", "far.example:1"), **secret)
    assert "s3cret" not in str(caught.value)
    assert Connection(urls=("far.example:1",), token_in_plain_text=True, **secret)
    assert Connection(urls=("grpcs://far.example:1",), **secret).secure
    assert Connection(urls=("127.0.0.1:1", "[::1]:1", "localhost:1"), **secret)


def test_what_is_this_machine() -> None:
    assert all(map(is_loopback, ("127.8.9.1:1", "[::1]:1", "localhost:1", "unix:/a")))
    assert not any(map(is_loopback, ("10.0.0.1:1", "host:1", "[fe80::1]:1", "localhost.example:1", "0.0.0.0:1")))
