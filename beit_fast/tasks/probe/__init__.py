"""What every block of a frozen encoder knows of labels."""
