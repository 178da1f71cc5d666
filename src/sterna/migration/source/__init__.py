"""The source of a migration, phase by phase."""
