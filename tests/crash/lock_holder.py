"""A foreign process that takes the writer lock of an index and keeps it until told otherwise."""

from __future__ import annotations

import sys

import lmdb


def main(folder: str) -> None:
    with lmdb.open(folder, max_dbs=32, map_size=1 << 30) as env, env.begin(write=True):
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
