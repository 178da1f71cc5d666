"""The interrupt controller GICv2: what it does, what it holds, how that migrates."""
