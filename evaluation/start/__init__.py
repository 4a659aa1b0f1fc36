"""Before an evaluation computes anything: how many workers there are, and what it will cost."""
