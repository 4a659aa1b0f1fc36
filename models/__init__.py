"""The mathematics of TarFlow: network, likelihood, sampler, guidance, denoising, weights files.

Tensors in, tensors out: no processes, no cluster, no file but a weights file.
"""
