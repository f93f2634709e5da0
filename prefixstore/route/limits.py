"""Every bound and every weight of the router has its name here. Over a bound: 413 or 503 at once;
the router has no queue, since engines have one and know their load better."""

from __future__ import annotations

from prefixstore.config import KIB, MIB

BODY_BYTES_MAX = 64 * MIB
BODIES_BYTES_MAX = 512 * MIB  # of requests that are being answered, with what parsing makes of them
ADMIN_BODY_BYTES_MAX = 64 * KIB  # of an operator's request
REQUESTS_MAX = 1000  # being answered at once; `serve.limits.CONNECTIONS_MAX` has room for others
WORKER_REQUESTS_MAX = 512  # of one worker
WORKERS_MAX = 256
FILE_BYTES_MAX = MIB  # of workers

ATTEMPTS_MAX = 3  # workers a request is tried on; one that kills engines must not kill them all
CONNECT_S = 2.0  # with the look-up of the worker's name
FIRST_BYTE_S = 3600.0  # without a stream it is the last one; over it 504, and no other worker
BETWEEN_S = 300.0  # two bytes of an answer
PREFILL_S = 120.0  # the first leg, on whatever workers; then the decode worker computes
CLIENT_S = 60.0  # a client that takes nothing of its answer
KEEP_S = 2.0  # a connection that is not used: vLLM closes it after 5 s
CHUNK_BYTES = 64 * KIB  # of an answer, held at once
WAIT_MS = 500  # the prefill engine answers a little before its last chunks are in the store

POLL_S = 1.0  # vLLM takes some 10 ms to write its page of metrics
MODELS_S = 10.0  # how long the names of a worker's models are kept
POLL_ANSWER_S = 2.0
POLLS_FAILED_MAX = 3  # in a row; then a worker gets no requests until one succeeds
PAGE_BYTES_MAX = 8 * MIB  # of metrics, or of names of models

TOKENIZE_S = 2.0
TOKENIZE_BYTES_MAX = 8 * MIB  # of a body whose prompt is to be tokenized
TOKENS_BYTES_MAX = 64 * MIB  # of what comes of it
PREFILL_BYTES_MAX = 64 * MIB  # of a first leg's answer, which nobody reads
STORE_S = 0.25  # a question to a store
STORE_NAMES_S = 10.0  # how long the names of a store's models are kept
STORE_QUESTIONS_MAX = 32  # to all stores at once

BLOCK_TOKENS = 16  # where a worker does not say
BLOCKS_MAX = 1 << 20  # kept of one worker
EXPECT_S = 30.0  # a block of a prompt that was sent is there soon, or never
EVENT_BYTES_MAX = 64 * MIB  # of a message
EVENTS_HIGH_WATER = 100_000  # messages that wait for us; then some are lost

# What a request costs a worker, in tokens of prefill.
RUNNING_TOKENS = 128  # each request under way there slows the others, and this one
WAITING_TOKENS = 1024  # one that waits there and is not ours: how long is not known
FULL_TOKENS = 8192  # a cache so full that running requests will be evicted
FULL_SHARE = 0.9  # of its cache: from here on it counts
LOAD_SHARE = 0.1  # loading a token from a store, of computing it
SEGMENT_SHARE = 0.35  # blending a token, of computing it
