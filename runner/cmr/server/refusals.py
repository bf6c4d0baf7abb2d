"""What a client is told when it does not get its answer: OpenAI's error object, and the status that goes with it."""

from __future__ import annotations

from typing import Any

from cmr.errors import CMRError, RequestError

KINDS = {
    401: "authentication_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


class Refusal(CMRError):
    """A request that the server turns down itself, with an HTTP status, OpenAI's `code`, and headers."""

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


def status_of(error: CMRError) -> int:
    """Return the status for an error: 400 where the request is to blame, 500 where the server is."""
    if isinstance(error, Refusal):
        return error.status
    return 400 if isinstance(error, RequestError) else 500


def error_object(error: CMRError) -> dict[str, Any]:
    """Return the body that tells of an error in one sentence."""
    status = status_of(error)
    kind = KINDS.get(status, "invalid_request_error")
    return {
        "error": {"message": str(error), "type": kind, "param": None, "code": getattr(error, "code", None)}
    }
