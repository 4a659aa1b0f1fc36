"""Reference statistics: the features of a real data set, computed once by any number of processes, stored with provenance.

`reference.py` reads and writes them, `compute.py` shares the work of computing them, `make.py` is `tarflow reference`.
"""
