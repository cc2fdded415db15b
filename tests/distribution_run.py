"""Runs training commands one after another, in as many processes as it is started with:

    torchrun --nproc-per-node 2 tests/distribution_run.py SPEC.json [ACCELERATE_CONFIG.yaml [MIXED_PRECISION]]

SPEC.json holds a list of [module, arguments], as in [["training.pretrain", ["RECIPE.yaml", "--output_dir", "OUT"]]];
"copy" in place of the module copies a folder (from, to). With a configuration file of Accelerate its environment is set as
`accelerate launch` does, in float32 unless a mixed precision is named; FSDP is then let run on a CPU, which Accelerate does
only on GPUs.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import state
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env


def run(spec: str) -> None:
    torch.set_num_threads(1)
    for module, argv in json.loads(Path(spec).read_text()):
        if module != "copy":
            importlib.import_module(module).main(argv)
        elif os.environ["RANK"] == "0":
            shutil.copytree(*argv)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def use_configuration(path: str, mixed_precision: str = "no") -> None:
    """Set the environment that `accelerate launch --config_file path` gives its processes."""
    from accelerate.commands.launch import _validate_launch_command

    args = launch_command_parser().parse_args(
        ["--config_file", path, "--mixed_precision", mixed_precision, "script.py"]
    )
    own = dict(os.environ)
    args, _, _ = _validate_launch_command(args)
    os.environ.update(prepare_multi_gpu_env(args))
    os.environ.update(own)  # RANK and the like, of torchrun


def allow_fsdp_on_a_cpu() -> None:
    original = state.AcceleratorState.__init__

    def start(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    state.AcceleratorState.__init__ = start


if __name__ == "__main__":
    if len(sys.argv) > 2:
        use_configuration(*sys.argv[2:])
        allow_fsdp_on_a_cpu()
    run(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # the end of a process group is nothing to wait for
