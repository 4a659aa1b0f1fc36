"""What is checked before anything is made: the configuration against the data, the splits and the evaluation's rules.

Sees configuration, run directory, checkpoints and the weights that a run begins with. `train`, its dry run, `submit` and
`init` call `check_start`.
"""
