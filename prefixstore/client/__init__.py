"""A store on a server, with the interface of one in a folder: `prefixstore.open("http://...")`.

What must hold: no call takes longer than its deadline, a server that is gone costs a caller next to
nothing (`breaker`), and no byte counts before it was compared with its checksum.
"""
