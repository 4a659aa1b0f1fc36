"""The configuration of a run: its schema, reading and writing YAML with overrides, the page in docs/.

Sees the settings of models and data pipeline, which are sections of it.
"""
