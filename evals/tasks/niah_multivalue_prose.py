"""Four needles with one key in prose, all of their values wanted: RULER's niah_multivalue with another text as haystack, whence its name.

Seven digits each, at four of 40 depths; the score is the share of the four in the reply. Changed as in niah_single_2_prose; 128 new tokens. Under
teacher forcing the values stand in the order of the text.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_multivalue_prose", haystack="prose", n_values=4).task()
