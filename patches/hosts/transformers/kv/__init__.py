"""KV compression of decoders: cache layers that lose entries behind attention, head group by head group (kv-compression.md §10)."""
