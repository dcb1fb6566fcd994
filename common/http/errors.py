"""Errors that a client is told about, as objects in OpenAI's form."""

from typing import Any


class ApiError(Exception):
    """An error the client is told about, in OpenAI's form, with this HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 503: "overloaded_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def internal_error() -> ApiError:
    """What a client learns of an exception in the server: that there was one."""
    return ApiError(500, "internal server error", code="internal_error")


def failure(error: str | None) -> ApiError:
    """What a client learns of a completion that ended in an error: what it was, where that is known."""
    return ApiError(500, error, code="generation_failed") if error else internal_error()


def field_error(message: str) -> ApiError:
    """A 400 from a ValueError whose message begins with the field's name."""
    name = message.split(" ")[0].rstrip(":")
    return ApiError(400, message, param=name if name.isidentifier() else None)
