"""The mathematics of TarFlow: network, likelihood, guided sampling, denoising, weights files.

Tensors in, tensors out: no processes, no cluster, no files but weights files.
"""

if __name__ != "tarflow.models":  # it would make a second copy of every class
    raise ImportError(f"this folder is imported as tarflow.models, not as {__name__}")
