"""Four needles with four keys in prose, all of them asked for: RULER's niah_multiquery with another text as haystack, whence its name.

Seven digits each, at four of 40 depths; the score is the share of the four in the reply. Changed as in niah_single_2_prose; 128 new tokens. Under
teacher forcing the values stand in the order of the question.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_multiquery_prose", haystack="prose", n_keys=4, n_queries=4).task()
