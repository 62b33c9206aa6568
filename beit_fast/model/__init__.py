"""The vision Transformer of BEiT: configuration, layers, encoder, heads and resizing."""
