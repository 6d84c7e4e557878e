"""Loads models on a running Triton over gRPC, with its admin secret."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from clipship.core.errors import UsageError
from clipship.serving.errors import AccessDenied, BadAnswer
from clipship.serving.repository.golden_check import in_batches
from clipship.serving.server.admin_secret import ADMIN_HEADER, found_secret_file, read_secret
from clipship.serving.transport.base import Tensors, parameters_of
from clipship.serving.transport.connection import Connection
from clipship.serving.transport.grpc import TritonTransport


class Control:
    """Model control of a Triton. Use it as a context manager.

    Args:
        connection: to one server.
        secret_file: the admin secret's file; None: the one that ``clipship serve`` on this machine wrote, if any.
        timeout_s: maximum time of a load or an answer.

    Raises:
        UsageError: several servers, or the file cannot be read.
    """

    def __init__(self, connection: Connection, *, secret_file: Path | None = None, timeout_s: float = 120.0) -> None:
        if len(connection.addresses) != 1:
            raise UsageError(f"{', '.join(connection.addresses)}: publish to one server at a time, give one HOST:PORT")
        (self.url,) = connection.addresses
        file = secret_file or found_secret_file(self.url)
        secret = None if file is None else read_secret(file)
        headers = {**connection.headers, **({ADMIN_HEADER: secret} if secret else {})}
        self._timeout_s = timeout_s
        self._transport = TritonTransport(
            connection.urls[0], replace(connection, headers=headers, connect_timeout_s=timeout_s)
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: object) -> None:
        self._transport.close()

    def parameters(self, model: str) -> dict[str, str]:
        """The parameters in a served model's configuration.

        Raises:
            ServingError: as the transport.
        """
        return parameters_of(self._transport.model_config(model))

    def load(self, model: str) -> None:
        """Have the server load the model from its folder; returns when it is served.

        Raises:
            AccessDenied: the secret is missing or wrong; says what to do.
            ServingError: it could not be loaded; gives Triton's reason.
        """
        self._repository_call("RepositoryModelLoad", model)

    def unload(self, model: str) -> None:
        """Have the server unload the model.

        Raises:
            ServingError: as :meth:`load`.
        """
        self._repository_call("RepositoryModelUnload", model)

    def answers(self, model: str, name: str, rows: NDArray[Any], outputs: Sequence[str]) -> Tensors:
        """The ``outputs`` of ``model`` for ``rows`` [N, ...] of its one input ``name``, in batches that it takes.

        Raises:
            ServingError: as the transport.
        """

        def infer(batch: NDArray[Any]) -> Tensors:
            answer = self._transport.infer(model, {name: batch}, outputs, timeout_s=self._timeout_s).result()
            missing = [output for output in outputs if output not in answer]
            if missing:
                raise BadAnswer(f"{self.url}: {model} answers without {', '.join(missing)}: write its repository again")
            return answer

        return in_batches(infer, rows, int(self._transport.model_config(model)["max_batch_size"]))

    def _repository_call(self, method: str, model: str) -> None:
        try:
            self._transport.call(method, model_name=model)
        except AccessDenied as error:
            raise AccessDenied(
                f"{self.url}: its admin protocols are restricted: give --admin-secret FILE, which clipship serve wrote"
            ) from error
