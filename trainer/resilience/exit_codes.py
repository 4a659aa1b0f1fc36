"""Exit codes of a training process, for launchers and schedulers."""

FINISHED = 0  # train.max_images reached
FAILED = 1  # an error; the message says which
USAGE = 2  # a setting, argument or run directory is wrong: a restart would fail the same way
REQUEUE = 75  # stopped on request after saving: run the same command again to resume
NO_PROGRESS = 76  # the run learns nothing, or restarts commit no new checkpoint: look before restarting it
HUNG = 77  # no progress for too long; the log of the rank has the stacks of all threads
