"""One needle in prose beside three that are not asked for: RULER's niah_multikey_1 with another text as haystack, whence its name.

Four keys with seven digits each at four of 40 depths, one of them asked for. Changed as in niah_single_2_prose; 128 new tokens.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_multikey_1_prose", haystack="prose", n_keys=4).task()
