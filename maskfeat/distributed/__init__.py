"""Distributed runs: launch, process supervision, collectives, hang watchdog, preemption, FSDP, Slurm."""
