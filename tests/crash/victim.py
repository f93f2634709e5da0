"""A process that has a store open until it is killed.

``put`` puts one prompt when told to, ``idle`` does nothing. Those that work without end are
`benchmarks.crash_roles`.
"""

from __future__ import annotations

import sys

from prefixstore import Store
from tests.store_helpers import namespace_in, put_content, refs_of


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    role, folder, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with Store.open(folder) as store:
        ns = namespace_in(store)
        say("ready")
        if role == "put":
            sys.stdin.readline()
            put_content(ns, refs_of(ns, number, 16))
            say("put")
        sys.stdin.readline()


if __name__ == "__main__":
    main()
