"""The boards that ship: a module for each, which has it as `BOARD`."""
