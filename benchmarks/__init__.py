"""Programs that measure what the project claims: `python -m benchmarks.NAME [--quick] [--check]`.

Each prints the machine, the versions and a table; `--check` exits with 1 when a figure misses the bar in the program.
"""
