"""One needle in prose, its value a UUID: RULER's niah_single_3 with another text as haystack, whence its name.

Key: adjective-noun; value: UUID, right only as a whole; at one of 40 depths. Changed as in niah_single_2_prose; 128 new tokens.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_single_3_prose", haystack="prose", values="uuids").task()
