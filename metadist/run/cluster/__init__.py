"""Runs on a SLURM cluster: submission, the program of a rank, what happens after it, waiting, status."""
