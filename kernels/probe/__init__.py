"""Reductions of attention without its matrix: one row, the mean that each key receives, the variance of its column."""

from accel.kernels.probe.api import attention_moments, attention_row, dispatches, mean_attention
from accel.kernels.probe.request import AttentionMoments

__all__ = ["AttentionMoments", "attention_moments", "attention_row", "dispatches", "mean_attention"]
