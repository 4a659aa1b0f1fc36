"""How a training process ends, for whatever started it (contract 7)."""

FINISHED = 0  # train.max_images reached
FAILED = 1  # an error; the text says which
USAGE = 2  # a setting, argument or run directory is wrong: starting again would end the same way
REQUEUE = 75  # stopped on request after saving: run the same command again to go on
NO_PROGRESS = 76  # restarted again and again without a new checkpoint: do not start it again before looking
HUNG = 77  # nothing moved for too long; the rank's log has all threads' stacks
