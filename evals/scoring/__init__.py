"""Scores of prompts: log-probability of the right answers, and whether the model gives them."""
