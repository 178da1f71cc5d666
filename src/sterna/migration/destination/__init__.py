"""The destination of a migration, phase by phase."""
