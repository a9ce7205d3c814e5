"""Next-scale image models (VAR, Infinity): a cache per generation that asks a KV-compression method, head group by head group.

`host.py` is the way on and off; `door.py` makes the caches, `own.py` brings our models to it and `official.py` the published VAR class. `entries.py`
holds the entries of one head group and what a method's answer makes of them, `cache.py` the cache that the model attends through.
"""
