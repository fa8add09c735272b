"""What each of two processes does for test_parallel.py.

The training runs it is given, under DeepSpeed, one after the other in one start.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scir_cli import config, settings
from scir_cli.engine.distributed import DistributedContext
from scir_cli.stages import train
from scir_cli.training.trainer import Trainer

save = Trainer.save_checkpoint


class Interrupted(Exception):
    pass


def main() -> None:
    ranks = DistributedContext(cuda=False)
    assert ranks.zero and ranks.zero["zero_optimization"]["stage"] == 3  # as accelerate was told
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        ranks.zero["zero_optimization"]["stage"], ranks.sharded = job["stage"], False

        def save_and_stop(trainer: Trainer, last: int = job["stop"]) -> None:
            save(trainer)
            if trainer.step == last:
                raise Interrupted

        Trainer.save_checkpoint = save_and_stop  # type: ignore[method-assign]
        try:
            train.run_rank(config.build(settings.TrainSettings, job["values"], where="test"), ranks)
        except Interrupted:
            continue
    ranks.close()


main()
