"""What is checked before anything is made: the configuration against the data, the splits and the evaluation's rules.

Sees configuration, run directory and checkpoints of a run that goes on; `train`, its dry run and `submit` call `check_start`.
"""
