"""What 32-bit and 64-bit ARM have alike."""
