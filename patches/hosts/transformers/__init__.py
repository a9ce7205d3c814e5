"""Hugging Face transformers: one attention function and one mask function under our name, per-layer state outside the model.

transformers-integration.md §8 is the plan. `masks.py` holds the lazy mask, `layers.py` what a patched layer knows, `applicability.py`
the one test that sends a call to the original attention, `dispatch.py` the function transformers calls, `op.py` the opaque operator
behind it, `host.py` the way on and off.
"""
