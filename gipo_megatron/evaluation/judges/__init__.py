"""Judges decide which of two responses is better: components of the slot `judge`, one a file."""
