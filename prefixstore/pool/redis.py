"""A backend over Redis or Valkey: one server, or a cluster.

``redis://[user:password@]host[:port][,host:port..][/database]``, ``rediss://`` with TLS, or
``redis:///path/of/socket``. Of a cluster one server that is there is enough to find the others.

A cluster's slots are asked for when it is opened and whenever a server says a key has moved. A key
that is just on its way to another server is a miss. Servers are asked at the same time, each by a
thread of its own, so a lost one holds up no other.
"""

from __future__ import annotations

import threading
import time
from binascii import crc_hqx
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from prefixstore.errors import RemoteError
from prefixstore.pool.backend import Get, Put, Written
from prefixstore.pool.redis_address import Address
from prefixstore.pool.redis_answers import (
    came_of,
    entries_of,
    is_moved,
    is_no_cluster,
    page_of,
    runs_of,
    written_of,
)
from prefixstore.pool.redis_node import Node
from prefixstore.pool.resp import Command, RespError

PART_BYTES = 4 << 20  # larger values get slower: 2.5 GB/s at 1 MiB, 1.1 at 16
SLOTS = 16384
THREADS_MAX = 16
NODES_MAX = 1024  # of a cluster
ASK_AGAIN_S = 1.0  # a cluster is asked for its slots this often at most
MAP_DEADLINE_S = 1.0
NEWS_KEPT = b"10000"
HEARD_MAX = b"1000"  # messages at a time
_SCAN_COUNT = b"2000"


class RedisBackend:
    """See the module docstring and `backend.Backend`."""

    part_bytes = PART_BYTES
    ask_first = True
    reads_short = True
    lists_late = False
    tells_news = True

    def __init__(self, url: str, password: str = "", ca_file: str | None = None) -> None:
        address = Address.parse(url, password, ca_file)
        scheme = url.partition(":")[0]
        self._login = address.login
        self._seeds = [Node(host, port, self._login) for host, port in address.seeds]
        named = ",".join(f"{host}:{port}" if port else host for host, port in address.seeds)
        self.url = f"{scheme}://{named}"
        self._nodes = {str(node): node for node in self._seeds}
        self._slots: list[Node | None] | None = None  # of a cluster
        self._owners = self._seeds  # those that have keys
        self._asked = False  # whether it is one
        self._ask_after = 0.0
        self._trouble: RemoteError | None = None
        self._learning = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="prefixstore-redis")

    @property
    def usable(self) -> bool:
        """See `Backend`."""
        return not self._owners or not all(node.breaker.is_open for node in self._owners)

    # ------------------------------------------------------------------ which server
    def _learn(self, deadline: float) -> None:
        """Ask which server has which slots, if it is time to; one thread at a time. Raises
        RemoteError when no server answers and nothing is known."""
        if not self._learning.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise RemoteError(f"{self.url} does not tell which server has which keys")
        try:
            now = time.monotonic()
            if now >= self._ask_after:
                self._ask_after = now + ASK_AGAIN_S
                self._trouble = self._ask_for_slots(min(deadline, now + MAP_DEADLINE_S))
            if not self._asked:
                raise RemoteError(str(self._trouble))
        finally:
            self._learning.release()

    def _ask_for_slots(self, deadline: float) -> RemoteError | None:
        """Ask all servers at once, so that a slow one takes nobody's time: the first answer counts.
        None, or what the trouble of one of them is."""
        asked: dict[Future[list[Any]], Node] = {}
        trouble = RemoteError(f"{self.url} does not tell which server has which keys")
        try:
            for node in sorted(self._nodes.values(), key=lambda one: one.breaker.is_failing):
                question = [Command([b"CLUSTER", b"SLOTS"])]
                asked[self._threads.submit(node.run, question, deadline)] = node
            for future in as_completed(asked, max(0.0, deadline - time.monotonic())):
                try:
                    [reply] = future.result()
                    if not is_no_cluster(reply):
                        self._take_slots(self._read_slots(reply, asked[future]))
                    self._asked = True
                    return None
                except RemoteError as error:
                    trouble = error
        except FutureTimeout:
            pass
        except RuntimeError as error:
            raise RemoteError(f"{self.url} was closed") from error
        finally:
            for future in asked:
                future.cancel()  # one that has begun ends by the deadline
        return trouble

    def _take_slots(self, slots: list[Node | None]) -> None:
        """Have the servers be those that have slots, and those that we were told of."""
        self._owners = [one for one in dict.fromkeys(slots) if one is not None]
        self._slots = slots
        before, self._nodes = self._nodes, {str(one): one for one in (*self._seeds, *self._owners)}
        for name in before.keys() - self._nodes.keys():
            before[name].close()

    def _read_slots(self, reply: Any, told_by: Node) -> list[Node | None]:
        if isinstance(reply, RespError):  # of a server that is busy, say: it is asked again
            raise RemoteError(f"{told_by}: {reply}")
        slots: list[Node | None] = [None] * SLOTS
        nodes = dict(self._nodes)
        try:
            for first, last, (host, port, *_), *_ in reply:
                name = host.decode() or told_by.host
                node = Node(name, int(port), self._login)
                node = nodes.setdefault(str(node), node)
                if not (0 <= first <= last < SLOTS and 0 < node.port < 65536):
                    raise ValueError(f"slots {first} to {last} of {node}")
                if len(nodes) > NODES_MAX:
                    raise ValueError(f"more than {NODES_MAX} servers")
                slots[first : last + 1] = [node] * (last + 1 - first)
        except (AttributeError, TypeError, ValueError) as error:
            raise RemoteError(f"{told_by} tells its slots as nobody can read: {error}") from error
        if not any(slots):  # of a cluster that it is no part of any more
            raise RemoteError(f"{told_by} knows of no server that has slots")
        return slots[:SLOTS]

    def _node_of(self, name: str) -> Node | None:
        if self._slots is None:
            return self._seeds[0]
        return self._slots[crc_hqx(name.encode(), 0) % SLOTS]

    # ------------------------------------------------------------------ asking them
    def _run(
        self, names: Sequence[str], commands: Sequence[Command], deadline_s: float
    ) -> list[Any]:
        """The answer to a command for each name; RemoteError in place of those of a server that
        is lost. Raises RemoteError when all are."""
        if not names:
            return []
        if deadline_s <= 0:
            raise RemoteError(f"no time was left to ask {self.url}")
        deadline = time.monotonic() + deadline_s
        if not self._asked:
            self._learn(deadline)
        answers: list[Any] = [None] * len(names)
        wanted = list(range(len(names)))
        for again in (True, False):
            self._ask(names, commands, wanted, answers, deadline)
            moved = [i for i in wanted if is_moved(answers[i])]
            lost = any(isinstance(answers[i], RemoteError) for i in wanted)
            if (moved or lost) and self._slots is not None:
                self._learn(deadline)
            if not moved or not again:
                break
            wanted = moved
        if all(isinstance(answer, RemoteError) for answer in answers):
            raise answers[0]
        return answers

    def _ask(
        self,
        names: Sequence[str],
        commands: Sequence[Command],
        wanted: Sequence[int],
        answers: list[Any],
        deadline: float,
    ) -> None:
        shares: dict[Node | None, list[int]] = {}
        for i in wanted:
            shares.setdefault(self._node_of(names[i]), []).append(i)

        def ask(node: Node | None, which: list[int]) -> None:
            try:
                if node is None:
                    raise RemoteError(f"no server of {self.url} has this part of the keys")
                told = node.run([commands[i] for i in which], deadline)
            except RemoteError as error:
                told = [error] * len(which)
            for i, answer in zip(which, told, strict=True):
                answers[i] = answer

        *others, mine = shares.items()
        try:
            futures = [self._threads.submit(ask, *share) for share in others]
        except RuntimeError as error:
            raise RemoteError(f"{self.url} was closed") from error
        ask(*mine)
        for future in futures:
            future.result()  # ends by the deadline: each call in it does

    # ------------------------------------------------------------------ what a backend does
    def put(
        self,
        puts: Sequence[Put],
        *,
        deadline_s: float,
        ttl_s: float | None = None,
        replace: bool = False,
    ) -> list[Written]:
        """See `Backend`."""
        rest = [] if replace else [b"NX"]
        if ttl_s is not None:
            rest += [b"PX", b"%d" % max(1, int(1000 * ttl_s))]
        commands = [Command([b"SET", one.name.encode()], one.whole, rest) for one in puts]
        answers = self._run([one.name for one in puts], commands, deadline_s)
        return [written_of(answer) for answer in answers]

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        """See `Backend`. An object of no bytes is none."""
        names: list[str] = []
        commands: list[Command] = []
        for one in gets:
            for start, outs in runs_of(one):
                stop = start + sum(out.nbytes for out in outs)
                words = [b"GETRANGE", one.name.encode(), b"%d" % start, b"%d" % (stop - 1)]
                names.append(one.name)
                commands.append(Command(words, outs=outs))
        answers = iter(zip(commands, self._run(names, commands, deadline_s), strict=True))
        return [came_of([next(answers) for _ in runs_of(one)]) for one in gets]

    def exist(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """See `Backend`."""
        return self._each(b"EXISTS", names, deadline_s)

    def delete(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """See `Backend`."""
        return self._each(b"UNLINK", names, deadline_s)

    def _each(self, verb: bytes, names: Sequence[str], deadline_s: float) -> list[bool]:
        commands = [Command([verb, name.encode()]) for name in names]
        return [answer == 1 for answer in self._run(names, commands, deadline_s)]

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[list[str]]:
        """See `Backend`."""
        if not self._asked:
            self._learn(time.monotonic() + deadline_s)
        if self._slots is not None and None in self._slots:
            raise RemoteError(f"no server of {self.url} has some of the keys")
        nodes = self._seeds[:1] if self._slots is None else self._owners
        pattern = f"{prefix}*".encode()
        for node in nodes:
            cursor = b"0"
            while True:
                words = [b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _SCAN_COUNT]
                [reply] = node.run([Command(words)], time.monotonic() + deadline_s)
                page = page_of(node, reply)
                yield page.names
                cursor = page.cursor
                if cursor == b"0":
                    break

    def announce(self, topic: str, message: bytes, *, deadline_s: float) -> None:
        """See `Backend`: an entry of a stream."""
        words = [b"XADD", topic.encode(), b"MAXLEN", b"~", NEWS_KEPT, b"*", b"m", message]
        self._one(topic, words, deadline_s)

    def hear(self, topic: str, after: str, *, wait_s: float) -> tuple[str, list[bytes]]:
        """See `Backend`."""
        name = topic.encode()
        if not after:
            last = self._one(topic, [b"XREVRANGE", name, b"+", b"-", b"COUNT", b"1"], wait_s)
            return (entries_of(last) or [("0-0", b"")])[0][0], []
        wait = [b"BLOCK", b"%d" % max(1, int(1000 * wait_s))]
        words = [b"XREAD", b"COUNT", HEARD_MAX, *wait, b"STREAMS", name, after.encode()]
        told = self._one(topic, words, wait_s + MAP_DEADLINE_S)
        entries = [] if told is None else entries_of(told[0][1])
        return entries[-1][0] if entries else after, [message for _, message in entries]

    def _one(self, topic: str, words: Sequence[bytes], deadline_s: float) -> Any:
        [answer] = self._run([topic], [Command(words)], deadline_s)
        if isinstance(answer, RespError):
            raise RemoteError(f"{self.url}: {answer}")
        return answer

    def check_open(self, deadline_s: float) -> None:
        """See `Backend`."""
        deadline = time.monotonic() + deadline_s
        self._learn(deadline)
        node = self._node_of("")
        if node is None:
            raise RemoteError(f"no server of {self.url} has some of the keys")
        [reply] = node.run([Command([b"EXISTS", b""])], deadline)
        if isinstance(reply, RespError):
            raise RemoteError(f"{node}: {reply}")

    def close(self) -> None:
        """See `Backend`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for node in list(self._nodes.values()):
            node.close()
