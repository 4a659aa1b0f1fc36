"""`tarflow checkpoint`: list, verify, export, prune and rewind the checkpoints of a run."""

EXAMPLE = """examples:
  tarflow checkpoint list runs/demo
  tarflow checkpoint verify runs/demo
  tarflow checkpoint export runs/demo --out demo.safetensors --weights ema-0.050
  tarflow checkpoint prune runs/demo --keep-latest 3
  tarflow checkpoint rewind runs/demo --images 64000

Exit codes: 0 success, 1 `verify` found damage, 2 wrong settings.
"""

VERBS = {
    "list": (
        "tarflow.trainer.commands.checkpoint_list",
        "list the checkpoints of a run, and what else is there and why it is not used",
    ),
    "verify": (
        "tarflow.trainer.commands.checkpoint_verify",
        "read every byte, and compare sizes and checksums with those recorded at the commit",
    ),
    "export": ("tarflow.trainer.commands.checkpoint_export", "write a weights file"),
    "prune": (
        "tarflow.trainer.commands.checkpoint_prune",
        "remove checkpoints that the retention settings do not keep",
    ),
    "rewind": (
        "tarflow.trainer.commands.checkpoint_rewind",
        "resume from an earlier checkpoint; later ones are set aside",
    ),
}
