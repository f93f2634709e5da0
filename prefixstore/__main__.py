"""``python -m prefixstore`` is the command ``prefixstore``."""

from prefixstore.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
