"""One plan of sampling for all workers on some samples: the first measures it, the others take it over."""

from collections.abc import Callable
from pathlib import Path

from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.shared_work import SharedWork
from tarflow.models.errors import ModelError
from tarflow.models.sampling.plan import SamplingPlan, conditions_of
from tarflow.records import DamagedFileError, load_record, save_record

NAME = "sampling-plan.json"  # a unit of the shared work


def share_sampling_plan(
    work: SharedWork, sampler: Sampler, weights: str, num: int, log: Log, over: Callable[[], bool]
) -> bool:
    """Give the sampler the plan that holds for all; False if the work is `over` before there is one.

    `weights`: their hash; `num`: samples in the batch that is measured. Without sampling.method=auto nothing is measured, and
    nothing is shared.
    """
    settings = sampler.sampling.settings
    if settings.method != "auto":
        return True

    def fits(path: Path) -> bool:
        try:
            load_record(path, SamplingPlan).check(conditions_of(sampler.model.config, settings, weights))
        except (DamagedFileError, ModelError):
            return False
        return True

    def measure(_name: str, path: Path) -> None:
        save_record(path, sampler.measure(range(num), weights, log))

    if work.give_back([NAME], fits):
        log(f"  {work.path(NAME)} is damaged or of other weights, and measured again")
    while work.work_through([NAME], measure, over):
        try:
            shared = load_record(work.path(NAME), SamplingPlan)
        except FileNotFoundError:  # the work was finished and removed at this moment
            continue
        sampler.take_over(shared, weights)
        log(f"  sampling: {shared}")
        return True
    return False
