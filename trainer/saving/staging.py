"""Copies of a training state in host memory: training goes on while they are written to disk."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Host copies of a state, in buffers that live as long as the run: allocating (and pinning) them is the slow part."""

    def __init__(self) -> None:
        self._host: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as it is now, in host memory; valid until the next copy, which reuses the buffers."""
        on_device = False
        for name, tensor in state.items():
            source = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            on_device |= source.device.type != "cpu"
            held = self._host.get(name)
            local = held._local_tensor if isinstance(held, DTensor) else held
            if local is None or local.shape != source.shape or local.dtype != source.dtype:
                local = torch.empty_like(source, device="cpu", pin_memory=source.device.type == "cuda")
            local.copy_(source, non_blocking=True)
            # Not through the public constructor, which would move the copy back to the mesh's device.
            spec = tensor._spec if isinstance(tensor, DTensor) else None
            self._host[name] = DTensor(local, spec, requires_grad=False) if spec is not None else local
        for name in self._host.keys() - state.keys():
            del self._host[name]
        # The next step changes the weights in place, so all copies must have arrived before it begins.
        if on_device and torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self._host)
