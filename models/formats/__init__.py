"""Weights files from anywhere: tensors read without executing anything, and the published layout."""
