"""What belongs to one architecture of guests, a folder for each, which has it as `ARCHITECTURE`."""
