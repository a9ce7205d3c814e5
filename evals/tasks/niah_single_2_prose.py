"""One needle in prose: RULER's niah_single_2 with another text as haystack, whence its name.

Key: adjective-noun; value: seven digits; at one of 40 depths. Changed: Emerson's essays, which are in the public domain, again
from the first when they end (after some 170 thousand tokens), where RULER has essays that it may not give away; each prompt from a sentence of its
own on, where RULER begins all with the first; wording and word lists are our own. Other parameters as published; 128 new tokens.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_single_2_prose", haystack="prose").task()
