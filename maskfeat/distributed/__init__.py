"""Processes: launching, supervision, collectives, preemption, FSDP, Slurm."""
