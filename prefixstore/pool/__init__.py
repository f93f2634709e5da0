"""A pool: the chunks of many hosts in an engine that is there already, Redis or object storage.

`backend` says what an engine must be able to do, `redis` and `s3` do it, `objects` says what a
chunk looks like in one (`coded`: with a codec), `store` and `namespace` make a store of any of
them.
"""
