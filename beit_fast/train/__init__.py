"""How anything is trained: the loop, the optimiser, checkpoints and logs. Knows tasks, not BEiT."""
