"""From a configuration and a profile to jobs in Slurm's queue: profiles, batch scripts, the snapshot of the code.

Sees the job that will run, and Slurm's commands.
"""
