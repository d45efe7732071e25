"""The errors of training: each says what, what was expected, what was found, how to mend it."""

from __future__ import annotations

from models.errors import HoraceError


class TrainError(HoraceError):
    """Training that cannot start or go on; the base of every error of `train`."""


class RunError(TrainError):
    """A run directory that is missing, taken, damaged, or of another configuration."""


class ExportError(TrainError):
    """A graph that cannot be written or does not do what the trained network does."""
