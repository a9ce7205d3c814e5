"""Methods in vLLM: a general plugin, attention backends, models with fewer visual tokens, and the way to start them (vllm-integration.md).

vLLM builds its model in processes of its own, so nothing is patched afterwards: a recipe travels to them in the engine's options (`options.py`),
the plugin (`plugin.py`) makes our models known in each by names of their own, workers whose engine asks put our attention in front of vLLM's, and
each is asked what became of it (`worker.py`). `compat.py` holds every import of vLLM. Importing this package imports neither vLLM nor torch.
"""
