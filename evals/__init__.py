"""Accuracy and latency together: tasks, embedded models, one runner and its reports."""
