"""A proxy between the two ends of a live migration, which sees what both say and changes none of it."""
