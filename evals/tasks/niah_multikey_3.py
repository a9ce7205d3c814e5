"""One needle in a haystack of needles, keys and values UUIDs: RULER's niah_multikey_3, the hardest of its kind.

Every line is a needle, one of them asked for, at a random line; the value is right only as a whole. Parameters as published; the wording is our own;
128 new tokens. Where dense answers none, no method can be told from another.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_multikey_3", haystack="needles", keys="uuids", values="uuids").task()
