"""A LLaVA of about two million weights, trained on drawn scenes. See card.md."""
