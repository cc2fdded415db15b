"""The plan of the ablations: every cell's commands are ones that the training commands understand."""

import yaml

import tokenization.train
import training.pretrain
from benchmarks import ablations
from training.arguments import parse_recipe

PLAN = yaml.safe_load((ablations.ROOT / "benchmarks" / "ablations.yaml").read_text())


def test_every_cell_asks_for_what_the_commands_accept(tmp_path):
    for name, cell in PLAN["cells"].items():
        base_folder = tmp_path / "base"
        folder = base_folder if name == "base" else tmp_path / name
        commands = ablations.commands_of(
            cell, PLAN["base"], folder=folder, base_folder=base_folder, data=["DIR"], seed=1
        )
        for module, *argv in commands[:-1]:
            command = {"tokenization.train": tokenization.train, "training.pretrain": training.pretrain}[module]
            model, *_ = instances = parse_recipe(argv, command.ARGUMENTS)
            config_class = command.CONFIG_CLASS
            config_class.from_preset(model.preset, **model.overrides())
            assert instances[-1].seed == 1
        assert commands[-1][0] == "training.evaluate" and (len(commands) == 3) == (
            "quantizer" in cell or name == "base"
        )


def test_the_table_shows_the_mean_of_the_seeds_and_their_range():
    rows = {"base": {"0": {"fve": 0.7, "macro_auroc": 0.8}, "1": {"fve": 0.72, "macro_auroc": 0.82}}}
    line = ablations.table(rows).splitlines()[-1]
    assert line.startswith("| base | 2 | 0.710 (0.700-0.720) |") and "0.810 (0.800-0.820)" in line
