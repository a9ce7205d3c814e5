"""What dropping visual tokens saves, on random weights of known shapes: `python -m accel.evals.visual_bench`."""
