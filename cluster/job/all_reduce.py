"""One all-reduce between all ranks, on the devices that training will use: the last check before the first step."""

import datetime
import os
import sys

DEVICE_FAILED = 90  # this rank's own device is broken: its node is to blame, whatever the others report


def main() -> int:
    """Sum the ranks; 0 if the sum is right. Runs in every task at once, with torchrun's variables set."""
    import torch
    import torch.distributed as dist

    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            assert torch.ones(1024, device=device).sum().item() == 1024
        except (RuntimeError, AssertionError) as error:
            print(f"{device} does not work: {error}", file=sys.stderr, flush=True)
            os._exit(DEVICE_FAILED)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=120))
    value = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(value)
    good = bool((value == size * (size + 1) / 2).all())
    if not good:
        print(f"all-reduce over {size} ranks on {device} gave {value[0].item()}", file=sys.stderr)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0 if good else 1)  # gloo's threads sometimes abort an orderly interpreter shutdown


if __name__ == "__main__":
    sys.exit(main())
