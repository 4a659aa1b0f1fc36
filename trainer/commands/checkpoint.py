"""`tarflow checkpoint`: look at a run's checkpoints, check their bytes, take weights out, make room."""

EXAMPLE = """examples:
  tarflow checkpoint list runs/demo
  tarflow checkpoint verify runs/demo
  tarflow checkpoint export runs/demo --out demo.safetensors --weights ema-0.050
  tarflow checkpoint prune runs/demo --keep-latest 3
  tarflow checkpoint rewind runs/demo --images 64000

Exit codes: 0 all well, 1 `verify` found damage, 2 wrong settings.
"""

VERBS = {
    "list": (
        "tarflow.trainer.commands.checkpoint_list",
        "table of a run's checkpoints, and of what is there but not used",
    ),
    "verify": (
        "tarflow.trainer.commands.checkpoint_verify",
        "read every byte and compare sizes and checksums with those of the commit",
    ),
    "export": ("tarflow.trainer.commands.checkpoint_export", "write a weights file"),
    "prune": (
        "tarflow.trainer.commands.checkpoint_prune",
        "remove checkpoints that the retention settings do not keep",
    ),
    "rewind": (
        "tarflow.trainer.commands.checkpoint_rewind",
        "let the run go on from an earlier checkpoint; those after it are set aside",
    ),
}
