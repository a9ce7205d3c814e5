"""What the RULER tasks share (Hsieh et al., COLM 2024, arXiv 2404.06654).

Kept as published in all of them, as compared with the benchmark's own generators: how a prompt is built and how many things of each kind it holds,
the model's chat template around it, a reply that is begun by the words that lead to the answer, greedy decoding of so many new tokens, prompt and
new tokens together within the length, and the score: the share of the right answers that appear in the reply, in capitals or not. Ours are the
wording, the lists of words and what a task's card says.
"""

from __future__ import annotations

GROUP = "ruler"
# the tokens that a model may write, as published
NIAH_TOKENS, VT_TOKENS, CWE_TOKENS, FWE_TOKENS = 128, 30, 120, 50
# one line of the haystack that says nothing
NOISE = "The road is long and the hills are low. A bird sings in the tree. We walk on, rest at noon, and walk on again."
CAVEAT = (
    "RULER tasks have the published parameters and rule, and wording and word lists of our own: compare methods with dense here, not with tables "
    "elsewhere. RULER flatters sparse prefill: methods that are near dense here have lost 3 to 9 points on few-shot, code and summaries."
)
