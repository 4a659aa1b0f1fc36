"""Names of metrics. Only the Inception network of 2015 with its published weights gives an FID, an sFID or a KID.

Those of any other network carry its name: `fd_efficientnet_lite0`, `kd_mobilenet_v2`. Nothing heavy is imported here.
"""

FID_NETWORK = "fid_inception"


def distance_key(network: str) -> str:
    """Name of the Frechet distance in results: `fid`, or `fd_` and the network."""
    return "fid" if network == FID_NETWORK else f"fd_{network}"


def kernel_key(network: str) -> str:
    """Name of the kernel distance: `kid`, or `kd_` and the network."""
    return "kid" if network == FID_NETWORK else f"kd_{network}"


def spatial_key(network: str) -> str:
    """Name of the distance of spatial features: `sfid`, or `sfd_` and the network."""
    return "sfid" if network == FID_NETWORK else f"sfd_{network}"


def is_distance(key: str) -> bool:
    """Whether a key of a result names a Frechet distance (and not, say, its standard error)."""
    return (key == "fid" or key.startswith("fd_")) and not key.endswith("_stderr")


def is_kernel(key: str) -> bool:
    """The same for a kernel distance."""
    return (key == "kid" or key.startswith("kd_")) and not key.endswith("_stderr")


def is_spatial(key: str) -> bool:
    """The same for a distance of spatial features."""
    return (key == "sfid" or key.startswith("sfd_")) and not key.endswith("_stderr")
