"""A client's token, which is in a file of its own, or in the environment: not in a command line,
where others see it."""

from __future__ import annotations

import os

from prefixstore.errors import ConfigError

TOKEN_BYTES_MAX = 4096
TOKEN_VARIABLE = "PREFIXSTORE_TOKEN"


def token_of(path: str | os.PathLike[str] | None) -> str:
    """The token in a file, if one is named, else that in the environment, else "". Raises
    ConfigError."""
    return os.environ.get(TOKEN_VARIABLE, "") if path is None else read_token(path)


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file that holds nothing else. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            token = file.read(TOKEN_BYTES_MAX + 1).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token file: {error}", "give the file's name") from error
    if not token or len(token) > TOKEN_BYTES_MAX or ":" in token or "\n" in token:
        raise ConfigError(
            f"{os.fspath(path)} does not hold one token",
            "the token alone: of the server's file it is what stands behind the tenant's name",
        )
    return token
