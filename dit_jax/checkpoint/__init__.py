"""Checkpoints: Orbax behind one package, each with the config that made it and a manifest that proves its content.

`store` writes and reads them, `manifest` says what a good one holds, `content` sums up arrays on any mesh, `rotation`
says which are kept, `agreement` lets the processes of a run decide as one, and `workdir` finds them.
"""

from dit_jax.checkpoint.manifest import DamagedCheckpoint
from dit_jax.checkpoint.store import CHECKPOINTS, SNAPSHOTS, Checkpoints, print_line
from dit_jax.checkpoint.workdir import (
    CONFIG_FILE,
    find_checkpoint,
    params_digest,
    read_alone,
    read_config,
    read_newest_good,
    restore_eval_params,
    verify_workdir,
    write_config,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "SNAPSHOTS",
    "Checkpoints",
    "DamagedCheckpoint",
    "find_checkpoint",
    "params_digest",
    "print_line",
    "read_alone",
    "read_config",
    "read_newest_good",
    "restore_eval_params",
    "verify_workdir",
    "write_config",
]
