"""How migrations converge: a module for each policy, which has it as `POLICY`."""
