"""Method `auto`: the fastest path and engine of each block, measured on the first batch.

Every candidate is timed on the samples themselves; one that could not win even if it converged at once is not run to its end.
The plan holds what was measured. It is deterministic to use, not to make: several workers share one.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tarflow.models.float32 import products
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.sampling import native
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import check_labels, make_engine
from tarflow.models.sampling.joint import Stack, joint
from tarflow.models.sampling.paths import JOINT, SEQUENTIAL, WHOLE, Inverted, Path, certify, follow
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan, conditions_of
from tarflow.models.sampling.settings import SamplingSettings

WIDTHS = (8, 32)
STEPS = 8  # single tokens, for choosing between engines
TURNS = (2, 20)  # how often what is compared is timed: at least, and where it takes little time at most
TURNS_S = 0.1  # that is timed in all, where that takes no more turns
LEAST_PASSES = 4  # of a whole sequence: none converged in fewer on trained weights
CERTIFIED = 4  # samples, of a path that is not an iteration
JOINT_BATCH = 16  # samples; larger batches keep a device busy block by block
JOINT_BYTES = 1 << 30  # of weights, which a joint iteration holds a second time


@torch.inference_mode()
def measure_plan(
    model: TarFlow,
    noise: Tensor,
    labels: Tensor | None,
    settings: SamplingSettings,
    weights: str = "",
    compiled: bool = True,
) -> SamplingPlan:
    """Plan the sampling of batches like this one: noise [N, T, D], labels [N].

    `compiled=False` plans for torch alone, as where there is no compiler.
    """
    check_labels(model, labels, noise.shape[0])
    config = model.config
    x = noise.float() * model.var.float().sqrt()
    start, blocks, problem = x, list[BlockPlan](), ""
    for number in reversed(range(config.num_blocks)):
        block: FlowBlock = model.blocks[number]  # type: ignore[assignment]
        guidance = Guidance.of_block(settings, number, config.num_blocks, config.num_tokens)
        engines = ["native", "eager"] if compiled and not native.why_not(block) else ["eager"]
        trial = _Trial(block, block.order(x), labels, guidance, settings.tolerance, engines)
        blocks.append(trial.run())
        x, problem = block.order(trial.x), problem or trial.problem
    blocks = _perhaps_at_once(model, start, labels, settings, blocks)
    machine = {
        "device": torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type,
        "threads": torch.get_num_threads(),
        "batch": noise.shape[0],
        "torch": torch.__version__,
    } | ({"no graphs": problem} if problem else {})
    return SamplingPlan(blocks=blocks[::-1], conditions=conditions_of(config, settings, weights), machine=machine)


def _perhaps_at_once(
    model: TarFlow, x: Tensor, labels: Tensor | None, settings: SamplingSettings, blocks: list[BlockPlan]
) -> list[BlockPlan]:
    """The blocks' plans, in the order of sampling; those of the joint iteration where that is faster and proven."""
    config, (n, tokens, _) = model.config, x.shape
    weights = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    if config.num_blocks < 2 or tokens < 3 or n > JOINT_BATCH or weights > JOINT_BYTES:
        return blocks
    numbers = range(config.num_blocks)[::-1]
    members: list[FlowBlock] = [model.blocks[number] for number in numbers]  # type: ignore[misc]
    guidances = [Guidance.of_block(settings, number, config.num_blocks, tokens) for number in numbers]
    stacks: list[Stack] = []
    seconds = _timed(x.device, lambda: stacks.append(Stack(members, labels, n, guidances)))
    at = torch.stack([block.order(x) for block in members])
    seconds += LEAST_PASSES * min(_timed(x.device, lambda: stacks[0].scales_and_shifts(at)) for _ in range(2))
    stacks.clear()
    best = sum(block.seconds[str(block)] for block in blocks)
    if seconds > best:
        return blocks
    found: list[Inverted] = []
    z = members[0].order(x)
    seconds = _timed(x.device, lambda: found.extend(joint(members, z, labels, guidances, settings.tolerance)))
    proven = all((one.converged & (one.certificate <= settings.tolerance)).all() for one in found)
    share, path = float(f"{seconds / len(blocks):.3g}"), str(JOINT)
    measured = [
        {"seconds": block.seconds | {f"eager {path}": share}, "passes": block.passes | {f"eager {path}": int(one.passes.max())}}
        for block, one in zip(blocks, found)
    ]  # fmt: skip
    change = {"engine": "eager", "path": JOINT.kind, "width": 0} if proven and seconds < best else {}
    return [block.model_copy(update=change | more) for block, more in zip(blocks, measured)]


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _turns(seconds: float) -> int:
    """How often something that takes `seconds` is timed."""
    least, most = TURNS
    return min(max(least, math.ceil(TURNS_S / max(seconds, 1e-9))), most)


class _Trial:
    """The candidates of one block."""

    def __init__(
        self,
        block: FlowBlock,
        z: Tensor,
        labels: Tensor | None,
        guidance: Guidance,
        tolerance: float,
        engines: list[str],
    ) -> None:
        self.block, self.z, self.labels, self.guidance, self.tolerance = block, z, labels, guidance, tolerance
        self.engines, self.problem = engines, ""
        self.x = z
        self.seconds: dict[str, float] = {}
        self.passes: dict[str, int] = {}
        self.best: tuple[float, str, Path] | None = None

    def run(self) -> BlockPlan:
        tokens = self.z.shape[1]
        single = min(self.engines, key=lambda engine: self._calls(engine, 1, STEPS))
        self._whole_run(single, SEQUENTIAL)
        assert self.best is not None
        if self.z.device.type == "cuda" and tokens > 2:
            self._try_graphs()
        for path, count, least in [
            *((Path("window", width), width, (tokens - 1) / width) for width in WIDTHS if width < tokens - 1),
            (WHOLE, tokens - 1, LEAST_PASSES),
        ]:
            if tokens < 3:
                continue
            engine = min(self.engines, key=lambda engine: self._calls(engine, count, 1))
            if self._calls(engine, count, 1) * least < self.best[0]:
                self._whole_run(engine, path)
        _, engine, path = self.best
        return BlockPlan(
            engine=engine, path=path.kind, width=path.width, passes=self.passes,
            seconds={name: float(f"{value:.3g}") for name, value in self.seconds.items()},
        )  # fmt: skip

    def _try_graphs(self) -> None:
        try:
            self._whole_run("graphed", SEQUENTIAL)
        except RuntimeError as error:  # of what does not let itself be recorded, or of memory: the plan says so
            self.problem = str(error).splitlines()[0][:200]
            torch.cuda.empty_cache()

    def _calls(self, engine: str, count: int, number: int) -> float:
        """Seconds of `number` calls over `count` tokens each; the best of several turns."""
        made = make_engine(engine, self.block, self.labels, len(self.z), self.guidance)
        at = range(0, min(number, self.z.shape[1] - count), 1)

        def once() -> float:
            return _timed(self.z.device, lambda: [made.tokens(self.z, i, count) for i in at])

        first = once()
        return min(first, *(once() for _ in range(_turns(first) - 1)))

    def _whole_run(self, engine: str, path: Path) -> None:
        """Invert the block; the best so far if it is the fastest, and every sample is certified.

        Whoever would take the place of another is timed again with it, in turns: a neighbour on the machine, who slowed one of
        them once, must not decide for a whole evaluation.
        """
        seconds, found, certificate = self._invert(engine, path)
        name = f"{engine} {path}"
        self.seconds[name], self.passes[name] = seconds, int(found.passes.max())
        if self.best is None:
            self.x, self.best = found.x, (seconds, engine, path)
            return
        if seconds >= self.best[0] or not bool(found.converged.all() & (certificate <= self.tolerance).all()):
            return
        before, held, held_path = self.best
        for _ in range(_turns(seconds)):
            before = min(before, self._invert(held, held_path)[0])
            seconds = min(seconds, self._invert(engine, path)[0])
        self.seconds[f"{held} {held_path}"], self.seconds[name] = before, seconds
        self.best = (seconds, engine, path) if seconds < before else (before, held, held_path)

    def _invert(self, engine: str, path: Path) -> tuple[float, Inverted, Tensor]:
        """Seconds, the samples and their certificates, whose cost counts where every sample's is to be computed.

        Of graphs a few samples are certified, as later of their batches.
        """
        n, made = len(self.z), list[Inverted]()

        def run() -> None:
            made.append(
                follow(path, make_engine(engine, self.block, self.labels, n, self.guidance), self.z, self.tolerance)
            )

        seconds = _timed(self.z.device, run)
        certificate = made[0].certificate
        if path.kind == "window":
            judge = make_engine("eager", self.block, self.labels, n, self.guidance)
            found: list[Tensor] = []
            with products():  # true float32, as when samples are certified
                seconds += _timed(self.z.device, lambda: found.append(certify(judge, made[0].x, self.z)))
            certificate = found[0]
        elif engine == "graphed":
            few = min(n, CERTIFIED)
            labels = None if self.labels is None else self.labels[:few]
            judge = make_engine("eager", self.block, labels, few, self.guidance)
            with products():  # true float32, as when samples are certified
                certificate = certify(judge, made[0].x[:few], self.z[:few])
        return seconds, made[0], certificate
