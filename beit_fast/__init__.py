"""beit_fast: BEiT pre-training and backbones, built for throughput."""
