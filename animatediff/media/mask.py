"""`read_mask`, for importers that have not moved to media/pictures.py yet."""

from animatediff.media.pictures import read_mask

__all__ = ["read_mask"]
