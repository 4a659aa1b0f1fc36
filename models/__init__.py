"""The mathematics of TarFlow: network, likelihood, sampler, guidance, denoising, weights files.

Tensors in, tensors out: no processes, no cluster, no file but a weights file.
"""

if __name__ != "tarflow.models":  # a second copy of every class would come of it
    raise ImportError(f"this folder is imported as tarflow.models, not as {__name__}")
