"""The guidance sweep: which guidance, denoising and attention temperature give the smallest distance.

`guidance.py` runs the rounds; candidates, the score of one candidate, the choice and the plot have a file each.
"""
