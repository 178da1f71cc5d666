"""Which version this is; what says so imports nothing else."""

VERSION = "0.2.0"
