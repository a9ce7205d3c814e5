"""Not a package of ours: a folder for PYTHONPATH, from which Python takes `sitecustomize` when it starts."""
