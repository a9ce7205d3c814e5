"""What cache methods save in a layer of known next-scale models: `python -m accel.evals.cache_bench`."""
