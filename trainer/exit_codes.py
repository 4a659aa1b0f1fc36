"""How a training process ends, for whatever started it (contract 7)."""

FINISHED = 0  # train.max_images reached
FAILED = 1  # an error; the text says which
USAGE = 2  # a setting or argument is wrong; nothing was started
REQUEUE = 75  # stopped on request after saving: run the same command again to go on
