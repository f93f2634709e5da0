"""How a store is named on the command line and in calls: a folder, or a server's or pool's URL.

Pure.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from prefixstore.codec import NONE, check_engine_choice
from prefixstore.errors import ConfigError
from prefixstore.urls import POOL_SCHEMES, SERVER_SCHEMES, shown

SCHEMES = (*SERVER_SCHEMES, *POOL_SCHEMES)


@dataclass(frozen=True, slots=True)
class Address:
    """A store as it was named: a folder, or a server's URL and what it takes to be let in; and the
    codec of what is stored there."""

    folder: Path | None
    url: str = ""
    token_file: str | None = None
    ca_file: str | None = None
    codec: str = NONE
    token: str = field(default="", repr=False)  # for who asks itself: an engine reads a file

    @classmethod
    def parse(
        cls,
        store: str | os.PathLike[str],
        token_file: str | os.PathLike[str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        codec: str = NONE,
        token: str = "",
    ) -> Address:
        """A path, ``dir:/path``, ``http://host:port``, ``https://...``, ``unix:/path``, or the URL
        of a pool. ``token`` is for where there is no file with one. Raises ConfigError."""
        text = os.fspath(store)
        scheme, _, rest = text.partition(":")
        check_engine_choice(codec, has_pool=scheme in POOL_SCHEMES)
        if scheme in SCHEMES and rest:
            if scheme == "unix":
                text = f"unix:{os.path.abspath(rest.removeprefix('//'))}"
            return cls(None, text, _absolute(token_file), _absolute(ca_file), codec, token)
        if token_file is not None or ca_file is not None:
            raise ConfigError(
                f"a token or ca_file for the folder {text}",
                "leave it out: the file system decides; a server is http://host:port",
            )
        folder = Path(rest if scheme == "dir" and rest else text).expanduser().absolute()
        return cls(folder, codec=codec)

    def __str__(self) -> str:
        return shown(self.url) or str(self.folder)

    @property
    def is_pool(self) -> bool:
        """Whether it is a pool's."""
        return self.url.partition(":")[0] in POOL_SCHEMES

    @property
    def engine_options(self) -> dict[str, str]:
        """What the engine's connector is told (`connector.options.EngineOptions`)."""
        folder = None if self.folder is None else str(self.folder)
        given = {
            "dir": folder, "url": self.url or None, "token_file": self.token_file,
            "ca_file": self.ca_file, "codec": self.codec if self.codec != NONE else None,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))
