"""Files of weights as others may have made them: tensors read without running anything, and the published layout.

Sees the model's configuration.
"""
