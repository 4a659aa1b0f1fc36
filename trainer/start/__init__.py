"""Checks before a run: the configuration against the data, the splits and the rules of the evaluation.

Reads the configuration, the run directory, checkpoints and initial weights. `train`, its dry run, `submit` and `init` call
`check_start`.
"""
