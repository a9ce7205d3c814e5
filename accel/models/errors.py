"""What can go wrong with a checkpoint."""

from __future__ import annotations

from accel.errors import AccelError


class CheckpointError(AccelError, ValueError):
    """A weights file cannot be read, is incomplete, or belongs to another model."""
