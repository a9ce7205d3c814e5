"""One needle in a haystack of needles: RULER's niah_multikey_2.

Every line is a needle (adjective-noun, seven digits), one of them asked for, at a random line. Parameters as published; wording and word lists are
our own; 128 new tokens. Nothing but the key tells the needle from its neighbours.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_multikey_2", haystack="needles").task()
