"""The verbs that evaluate, sample, sweep, make references, score and report: options, examples, one call each.

The top of the room: it may use everything else here.
"""
