"""Every bound of the server has its name here. Over a bound: 413, 429 or 503, never a queue.

Memory of the server is at most PUT_BYTES_MAX + CHECKED_BYTES_MAX for payloads under way,
BODY_BYTES_MAX for other bodies and what their JSON is parsed into (references take several times
their bytes once they are taken apart), and CONNECTIONS_MAX times 2 * READ_BYTES for what has
arrived and is not yet taken; checked gets have INLINE_BYTES each in the event loop besides.
Payloads sent from a tier's file or mapping take none.
`benchmarks.serve` measures this with slow clients.
"""

from __future__ import annotations

from prefixstore.config import GIB, KIB, MIB

CONNECTIONS_MAX = 1024
FILES_WANTED = 8192  # connections, as many copies of them while they send, files of the store
CONTROL_BODY_BYTES_MAX = 64 * MIB
JSON_BODY_BYTES_MAX = 4 * MIB  # parsing holds up everybody; token ids may come as int32 instead
PUT_BODY_BYTES_MAX = GIB
GET_BYTES_MAX = GIB  # in one answer
READ_BYTES = 256 * KIB  # of one connection, received and not yet taken

CONTROL_MAX = 64  # requests being answered at once
CONTROL_THREADS = 4
TENANT_SHARE = 0.5  # the most one of several tenants takes of CONTROL_MAX and of memory
INLINE_BODY_BYTES = 64 * KIB  # a larger one is taken apart on a thread
INLINE_REFS_MAX = 64  # chunks looked up on the event loop's thread, if they are in memory
INLINE_MATCH_REFS_MAX = 512  # likewise, by a match: a sixth of the time for each
INLINE_S = 0.005  # longest look-up that is done on the event loop's thread; after a longer one
INLINE_PAUSE_S = 5.0  # they are done on threads for so long
TRANSFERS_MAX = 128  # gets and puts at once
TENANT_TRANSFERS_MAX = 64
TENANT_BYTES_MAX = 4 * GIB  # in flight
TRANSFER_THREADS = 8
STORE_THREADS = 4
INLINE_BYTES = MIB  # from memory: sent at once, not on a thread
ALONE_BYTES = 8 * MIB  # likewise, by the only transfer: 2.5 ms, where a thread makes it 3.1
PUSH_BYTES = 64 * MIB  # sent by a thread before others have their turn
PUT_BYTES_MAX = 512 * MIB  # of puts, received and not yet stored
CHECKED_BYTES_MAX = 256 * MIB  # of gets that are read and checked before they are sent
BODY_BYTES_MAX = 256 * MIB  # of requests, without the payloads of puts
BATCH_BYTES = 8 * MIB  # of chunks given to the library at once
BATCH_CHUNKS = 64
SENDFILE_BYTES_MIN = 16 * KIB  # a shorter run is read, not sent by the kernel

HEADER_S = 10.0  # from the first byte of a request to the end of its headers
IDLE_S = 75.0  # a connection without a request
STALL_S = 10.0  # no byte of a body taken or given
BODY_S = 10.0  # of a whole body, beside what RATE_MIN gives its bytes
RATE_MIN_BYTES_S = MIB
SWEEP_S = 0.5  # how often these are looked at
SPIN_S = 0.005  # a sender waits so long on its thread before it waits without one
OP_S = 30.0  # a control request

ITEM_CHUNKS_MAX = 1 << 22  # items of a request times its chunks: each is compared with each
SEGMENT_TOKENS_MAX = 1 << 20  # searched for segments in one request
IDENTITY_BYTES_MAX = 64 * KIB
PIECES_MAX = 1 << 16  # (layer, plane, head) of a chunk: each is summed, and has its place in lists
PIECE_BYTES_MIN = 64
CHUNK_TOKENS_MAX = 4096  # are in the index with the chunk, and are all looked at when it is stored
ITEMS_BYTES_MAX = 8 * KIB  # of multimodal items in a preimage: it is kept with the chunk
LEASES_PER_TENANT_MAX = 1024
LEASE_CHUNKS_MAX = 65536  # in all leases of a tenant
NAMESPACES_PER_TENANT_MAX = 64
TENANTS_MAX = 1024
TOKEN_CHARS_MIN = 16
QUOTA_SHARE = 0.9  # of a tier is given out to tenants; the rest is for `local`

RETRY_AFTER_S = 1
ABORT_S = 1.0  # what is still under way then may take to end when it is cancelled
DRAIN_S = 30.0  # of a shutdown: requests under way may end, then the store is written to disk
