"""What tests of several files use. Plain functions; fixtures live in the conftest.py of a room."""
