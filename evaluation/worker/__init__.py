"""Evaluation of checkpoints as shared work of any number of processes; metrics of image folders.

`follow.py` finds what to evaluate, `evaluate.py` holds the steps of one evaluation: plan, compute, merge, measure, publish.
"""
