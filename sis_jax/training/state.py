"""Where a long fit keeps its state: one Orbax checkpoint in a folder, replaced as a whole, and
found again only by the run that wrote it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


class TrainingState:
    """The last state of a run in `folder`; None keeps nothing. config: what must be equal for a
    state to be this run's, a flat dict for JSON.
    """

    def __init__(self, folder: Path | None, config: dict[str, Any]):
        self.folder, self.config = folder, config
        self._manager: Any = None

    def save(self, step: int, arrays: PyTree, facts: Any) -> None:
        """Keep these arrays, and `facts` (for JSON), as the state after `step`; an interruption
        leaves the one before.
        """
        if self.folder is None:
            return
        import orbax.checkpoint as ocp  # late: takes a second to import

        meta = {"config": self.config, "facts": facts}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(jax.tree.map(np.asarray, arrays)),
            meta=ocp.args.JsonSave(meta),
        )
        manager = self._open()
        manager.save(step, args=args)
        manager.wait_until_finished()

    def restore(self, like: PyTree) -> tuple[int, PyTree, Any] | None:
        """(step, arrays shaped as `like`, facts) of the last state, None where there is none. What
        another configuration left is removed.
        """
        if self.folder is None or not self.folder.is_dir():
            return None
        import orbax.checkpoint as ocp  # late: takes a second to import

        manager = self._open()
        step = manager.latest_step()
        if step is None:
            return None
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["config"] != self.config:
            manager.close()
            self._manager = None
            shutil.rmtree(self.folder)
            return None
        wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(jax.tree.map(np.asarray, like)))
        return step, manager.restore(step, args=wanted)["arrays"], meta["facts"]

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp  # late: takes a second to import

            assert self.folder is not None
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
        return self._manager

    def close(self) -> None:
        """Let go of the folder."""
        if self._manager is not None:
            self._manager.close()
