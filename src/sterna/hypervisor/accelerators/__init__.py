"""The hypervisors that ship: a module for each, which has it as `ACCELERATOR`."""
