"""One needle in one line that is repeated: RULER's niah_single_1, the passkey task.

Key: adjective-noun; value: seven digits; a random line. Parameters as published; wording, the repeated line and the word lists are our own; 128 new
tokens. The needle is the only line that differs from its neighbours: the easiest haystack, which any method that keeps what stands out can pass.
"""

from __future__ import annotations

from accel.evals.tasks._niah import Niah

TASK = Niah("niah_single_1", haystack="noise").task()
