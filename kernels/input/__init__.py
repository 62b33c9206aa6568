"""From pixels to the sequence that enters the first block."""
