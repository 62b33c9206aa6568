"""Checkpoints of every layout: read, loaded into a model, written and converted."""
