"""Judges: who says which of two answers is better. One file a judge; the slot is `judge`."""
