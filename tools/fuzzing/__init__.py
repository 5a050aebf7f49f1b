"""Damaged inputs of the commands, drawn by hypothesis: see tools/fuzz.py."""
