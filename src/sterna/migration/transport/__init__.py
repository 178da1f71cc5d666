"""How pages leave the source: the work of a pass, records on the main channel or packets on others, the rate limit."""
