"""Classifier-free guidance of a flow (paper, section 3.5)."""

from dataclasses import dataclass

from tarflow.models.errors import ModelError


@dataclass(frozen=True)
class Guidance:
    """How samples are pushed towards the condition.

    For a_c, b_c of the guided network and a_u, b_u of the unguided one, the linear rule of the paper (section 3.5) is
    a = a_c + w (a_c - a_u), and the same for b: w = 0 is plain sampling (a_u is never computed).
    The unguided network sees no label and divides its attention logits by `attn_temp`.
    """

    weight: float = 0.0
    what: str = "ab"  # which of log-scale a and shift b are guided
    attn_temp: float = 1.0
    annealed: bool = False  # weight of token i is w * i / (T - 1): none at the first token, all at the last

    def __post_init__(self) -> None:
        if not set(self.what) <= set("ab"):
            raise ModelError(f"sampling.guide must be 'a', 'b', 'ab' or '', got {self.what!r}")
        if self.weight < 0:
            raise ModelError(f"sampling.guidance must be >= 0, got {self.weight}")
        if self.attn_temp <= 0:
            raise ModelError(f"sampling.attn_temp must be > 0, got {self.attn_temp}")

    @property
    def active(self) -> bool:
        return self.weight > 0 and bool(self.what)
