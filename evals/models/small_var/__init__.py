"""A VAR of about a million weights, its tokenizer and a judge, trained on drawn digits. See card.md."""
