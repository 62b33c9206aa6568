"""What is trained, one short file each."""
