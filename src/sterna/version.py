"""Which version this is; what says so imports nothing else."""

VERSION = "0.1.0"
