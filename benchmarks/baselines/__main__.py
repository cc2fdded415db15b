"""Networks of others on the same records, with the same budget, measured in the same way:

    python -m benchmarks.baselines train benchmarks/baselines/xresnet1d101.yaml --data DIR --output_dir OUT
    python -m benchmarks.baselines evaluate --checkpoint OUT --data DIR
    python -m benchmarks.baselines compare --data DIR --arm anyecg DIR1 DIR2 --arm xresnet1d101 DIR3 DIR4

`train` is `training.finetune` with a network of this folder (`preset` in the recipe), `evaluate` and `compare` are the
commands of `training`, which know these networks when started here. The other baselines need no network of their own:

    accelerate launch -m training.finetune training/recipes/small_statements.yaml --data DIR          (from scratch)
    accelerate launch -m training.finetune benchmarks/baselines/dense_attention.yaml --data DIR
    python -m training.evaluate --checkpoint checkpoints/anyecg-small --data DIR --probe random
"""

import sys
from collections.abc import Sequence

import training.compare
import training.evaluate
from training.commands import run_command

from .train_baseline import main as train

COMMANDS = {"train": train, "evaluate": training.evaluate.main, "compare": training.compare.main}


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        sys.exit(f"{__doc__}\nThe first argument must be one of: {', '.join(COMMANDS)}.")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)
