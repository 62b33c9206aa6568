"""Masked image modelling, and the tokenizer that comes before it."""
