"""The network front of a store: HTTP over TCP or a unix socket, thin over the library.

The server opens the store as any engine does and holds no index of its own: what it must remember
(leases, jobs) is bounded and may be lost. See docs/http.md for what it speaks.
"""
