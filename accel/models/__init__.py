"""Next-scale image models as Hugging Face models: `accel.models.var` and `accel.models.infinity`. `import accel` does not load them."""
