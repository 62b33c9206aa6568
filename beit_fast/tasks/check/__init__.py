"""Every image read and decoded once: what is broken, doubled, small, and of what kinds all are."""
