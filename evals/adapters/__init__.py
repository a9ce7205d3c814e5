"""Bridges to the harnesses that hold the published tasks: lm-eval (`lm_harness.py`) and lmms-eval (`lmms_harness.py`), each to be installed first."""
