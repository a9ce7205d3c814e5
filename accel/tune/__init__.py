"""Offline calibration: searches over options, and the length from which a method pays."""
