"""The inverse of the whole flow by a plan: every block by its path, each sample with its certificate.

What a plan's path does not settle is computed again, sample by sample, one token after the other in torch: a sample that did
not converge or was not begun, is not finite, or whose certificate is above the tolerance. It is counted, and nothing is
clamped. That path is the reference: there, a sample is what it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tarflow.models.errors import ModelError
from tarflow.models.float32 import products
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.sampling.engine import BlockEngine, EagerBlock
from tarflow.models.sampling.graphed import GraphedBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.joint import joint
from tarflow.models.sampling.native import NativeBlock
from tarflow.models.sampling.paths import Inverted, certify, finite, follow, nothing_done
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.room import Room
from tarflow.models.sampling.settings import SamplingSettings


@dataclass
class Sampled:
    """Samples, and how each came to be. All but the images are on the CPU; blocks are in the flow's forward order."""

    images: Tensor  # [N, C, H, W] float32, not clipped
    certificate: Tensor  # [N, blocks] float64, in units of the noise; NaN = not computed, or not finite
    passes: Tensor  # [N, blocks] int64
    redone: Tensor  # [N, blocks] bool: again, one token after the other
    trajectory: list[Tensor] = field(default_factory=list)  # after 0, 1, ... blocks


def together(parts: Sequence[Sampled]) -> Sampled:
    """Parts of a batch as one; copies, which outside inference mode can take part in a gradient."""
    trajectory = [torch.cat(steps) for steps in zip(*(part.trajectory for part in parts), strict=True)]
    images, certificate, passes, redone = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "certificate", "passes", "redone")
    )
    return Sampled(images, certificate, passes, redone, trajectory)


def make_engine(
    name: str, block: FlowBlock, labels: Tensor | None, n: int, guidance: Guidance, room: Room | None = None
) -> BlockEngine:
    """The engine of a plan; torch's own takes the place of a compiled one where that cannot serve, and of graphs off CUDA."""
    if name == "native":
        try:
            return NativeBlock(block, labels, n, guidance, room)
        except ValueError:  # a plan of another machine: the same samples within the tolerance, and certified
            pass
    kind = GraphedBlock if name == "graphed" and block.proj_in.weight.device.type == "cuda" else EagerBlock
    return kind(block, labels, n, guidance, room)


@torch.inference_mode()
def invert(
    model: TarFlow,
    noise: Tensor,
    labels: Tensor | None,
    settings: SamplingSettings,
    plan: SamplingPlan,
    certified: Tensor | None = None,
    judge: TarFlow | None = None,
    with_trajectory: bool = False,
) -> Sampled:
    """Standard normal noise [N, T, D] and labels [N] -> samples. The rest as in `sequential.sample`.

    `certified`: bool [N], whose certificate is computed where the path does not give one; None = nobody's. `judge`: the
    model that certificates go by, if it is not the one that samples.
    """
    check_labels(model, labels, noise.shape[0])
    config, n = model.config, noise.shape[0]
    if len(plan.blocks) != config.num_blocks:
        raise ModelError(f"the plan of sampling has {len(plan.blocks)} blocks, and the model {config.num_blocks}")
    wanted = torch.zeros(n, dtype=torch.bool) if certified is None else certified
    x = noise.float() * model.var.float().sqrt()  # the prior's scale per token and dimension; 1 where nvp
    shape = (n, config.num_blocks)
    done = Sampled(
        x, torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
    )  # fmt: skip
    if with_trajectory:
        done.trajectory.append(model.unpatchify(x))
    at_once = plan.is_joint and config.num_tokens > 1
    room = Room()
    jointly = _jointly(model, x, labels, settings, wanted, room) if at_once else None
    for number in reversed(range(config.num_blocks)):
        step = _step(model, number, x, labels, settings, room, judge)
        if jointly is None:
            found, redone = step.run(plan.blocks[number], wanted)
        else:
            found, redone = jointly[0][number], jointly[1]
            step.again(found, redone)
        x = step.block.order(found.x)
        done.certificate[:, number], done.passes[:, number], done.redone[:, number] = (
            found.certificate, found.passes, redone,
        )  # fmt: skip
        if with_trajectory:
            done.trajectory.append(model.unpatchify(x))
    done.images = model.unpatchify(x)
    return done


@dataclass
class _Step:
    """One block of one batch."""

    block: FlowBlock
    judge: FlowBlock
    z: Tensor  # in the block's order
    labels: Tensor | None
    guidance: Guidance
    tolerance: float
    room: Room  # of one engine at a time

    def run(self, how: BlockPlan, wanted: Tensor) -> tuple[Inverted, Tensor]:
        """The inverted block, and which samples [N] bool were computed again."""
        engine = make_engine(how.engine, self.block, self.labels, len(self.z), self.guidance, self.room)
        try:
            found = follow(how.how, engine, self.z, self.tolerance)
        except RuntimeError as error:
            if how.engine != "graphed" or isinstance(error, torch.OutOfMemoryError):
                raise
            found = nothing_done(self.z)  # the plan of a machine that can record a step, which this one cannot
        del engine  # and its cache: the room is the next one's
        good = found.converged & finite(found.x).cpu()
        if how.path != "sequential":
            wanted = torch.ones_like(wanted) if how.path == "window" else wanted | torch.isnan(found.certificate)
        self.certify(found, wanted & good)
        if how.is_reference:
            return found, torch.zeros_like(good)
        redone = ~good | self.missed(found, wanted)
        self.again(found, redone)
        return found, redone

    def missed(self, found: Inverted, wanted: Tensor) -> Tensor:
        """Bool [N]: whose certificate is above the tolerance, or is wanted and could not be computed."""
        return (found.certificate > self.tolerance) | (wanted & torch.isnan(found.certificate))

    def certify(self, found: Inverted, rows: Tensor) -> None:
        """Certify these samples in torch, also where a compiled path has its own certificate: the larger one counts."""
        if not rows.any():
            return
        at = rows.nonzero()[:, 0].to(self.z.device)
        engine = EagerBlock(self.judge, self._labels(at), len(at), self.guidance, self.room)
        with products():  # true float32, whatever samples
            mine = certify(engine, found.x[at], self.z[at])
        found.certificate[rows] = torch.fmax(found.certificate[rows], mine).where(~mine.isnan(), mine)

    def again(self, found: Inverted, rows: Tensor) -> None:
        """Compute these samples one token after the other."""
        if not rows.any():
            return
        at = rows.nonzero()[:, 0].to(self.z.device)
        x = self.z[at].clone()
        EagerBlock(self.block, self._labels(at), len(at), self.guidance, self.room).invert(x)
        found.x[at] = x
        found.passes[rows] += x.shape[1] - 1
        found.certificate[rows] = torch.nan
        self.certify(found, rows)

    def _labels(self, rows: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[rows]


def _step(
    model: TarFlow,
    number: int,
    x: Tensor,
    labels: Tensor | None,
    settings: SamplingSettings,
    room: Room,
    judge: TarFlow | None = None,
) -> _Step:
    """The step that inverts block `number`, given what the one before it has made, x [N, T, D] in the image's order."""
    block: FlowBlock = model.blocks[number]  # type: ignore[assignment]
    judged: FlowBlock = block if judge is None else judge.blocks[number]  # type: ignore[assignment]
    guidance = Guidance.of_block(settings, number, model.config.num_blocks, model.config.num_tokens)
    return _Step(block, judged, block.order(x), labels, guidance, settings.tolerance, room)


def _jointly(
    model: TarFlow, x: Tensor, labels: Tensor | None, settings: SamplingSettings, wanted: Tensor, room: Room
) -> tuple[dict[int, Inverted], Tensor]:
    """All blocks inverted at once, by number, and the samples bool [N] that have to be computed again in each."""
    numbers = range(model.config.num_blocks)[::-1]
    steps = [_step(model, number, x, labels, settings, room) for number in numbers]
    found = joint([s.block for s in steps], steps[0].z, labels, [s.guidance for s in steps], settings.tolerance)
    redone = ~found[0].converged
    for step, one, after in zip(steps, found, [*steps[1:], None]):
        step.certify(one, wanted & ~redone)
        redone = redone | step.missed(one, wanted)
        if after is not None:
            after.z = after.block.order(step.block.order(one.x))
    return dict(zip(numbers, found)), redone


def check_labels(model: TarFlow, labels: Tensor | None, batch: int) -> None:
    """Raise ModelError for labels that the model does not have; -1 (no label) is always valid."""
    if labels is None:
        return
    classes = model.config.num_classes
    if labels.shape != (batch,):
        raise ModelError(f"labels must have shape [{batch}], got {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= max(classes, 0):
        bad = low if low < -1 else high
        if not (classes == 0 and high == -1):
            raise ModelError(
                f"label {bad} is outside the model's {classes} classes (0..{classes - 1}, or -1 for no label)"
            )
