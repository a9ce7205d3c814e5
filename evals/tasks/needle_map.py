"""A map of retrieval over length and depth: one needle in prose, at one of eleven depths from the first sentence to the last.

Sample i has depth i mod 11 of 0, 10 … 100 %, so that 11 samples fill a column of the map and 22 hold every depth twice; each has a key, a value and
a stretch of prose of its own. The prompts are those of niah_single_2_prose, and 32 new tokens are enough for the seven digits.
`accel run --tasks needle_map --lengths 1k,2k,4k --samples 11`
"""

from __future__ import annotations

from accel.evals.tasks import Task
from accel.evals.tasks._niah import Niah

N_DEPTHS = 11
MAX_NEW_TOKENS = 32
CAVEAT = "needle_map: one or two needles at each place of the map show where a method is blind, not how often it is right."

TASK = Task(Niah("needle_map", haystack="prose", max_new_tokens=MAX_NEW_TOKENS, depth=lambda i: i % N_DEPTHS / (N_DEPTHS - 1)).samples, caveat=CAVEAT)
