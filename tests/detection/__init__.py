"""How surely the test bed finds each fault of a hypervisor: many runs of its scenarios, as a table."""
