"""Networks of others: they take AnyECG's batches, are what their sources say, and train by the command of fine-tuning."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

import benchmarks.baselines.__main__ as command
import training.finetune
from anyecg_hf.cardio_sparse_attention import cardio_sparse_mask
from anyecg_hf.configuration_anyecg import AnyECGConfig
from benchmarks.baselines import NETWORKS, speed
from benchmarks.baselines.s4d import S4D, S4DConfig
from benchmarks.baselines.train_baseline import build_model
from benchmarks.baselines.windows import aggregate, crop, cut
from training.arguments import ModelArguments, parse_recipe
from training.data import DataArguments, list_sources
from training.labels import build_task

FOLDER = Path(command.__file__).parent
SMALL = {
    "xresnet1d101": {"stage_blocks": [1, 2], "width": 8, "stem_channels": [8, 8, 16], "head_size": 16},
    "net1d": {"stem_channels": 16, "stage_channels": [16, 32], "stage_blocks": [1, 2]},
    "s4d": {"hidden_size": 16, "num_hidden_layers": 2},
}


def _model(network, **overrides):
    torch.manual_seed(0)
    config_class, model_class = NETWORKS[network]
    options = {**SMALL[network], **overrides}
    return model_class(config_class(**options, num_labels=5, problem_type="multi_label_classification")).eval()


def _batch(num_patches=10, *, seed=1):
    signal = torch.randn(2, 12, num_patches * 300, generator=torch.Generator().manual_seed(seed))
    return {
        "input_values": signal,
        "lead_ids": torch.arange(1, 13).expand(2, -1),
        "attention_mask": torch.ones(2, 12, num_patches, dtype=torch.long),
    }


@torch.no_grad()
def _logits(model, batch):
    return model(**batch).logits


def _agree(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network, millions", [("xresnet1d101", 1.881), ("net1d", 5.018), ("s4d", 2.202)])
def test_a_network_has_as_many_parameters_as_its_source_says(network, millions):
    config_class, model_class = NETWORKS[network]
    with torch.device("meta"):
        model = model_class(config_class(num_labels=71))
    assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_order_of_the_leads_does_not_matter(network):
    model, batch, order = _model(network), _batch(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = {name: value[:, order] for name, value in batch.items()}
    _agree(_logits(model, permuted), _logits(model, batch))
    permuted["lead_ids"] = batch["lead_ids"]
    assert not torch.allclose(_logits(model, permuted), _logits(model, batch), atol=1e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_absent_lead_is_the_same_left_out_masked_or_padded(network):
    model, batch = _model(network), _batch()
    kept = {name: value[:, :8] for name, value in batch.items()}
    masked = {**batch, "attention_mask": batch["attention_mask"].clone()}
    masked["attention_mask"][:, 8:] = 0
    padded = {**batch, "lead_ids": batch["lead_ids"].where(batch["lead_ids"] <= 8, 0)}
    for other in (masked, padded):
        _agree(_logits(model, other), _logits(model, kept))
    frank = {**batch, "lead_ids": torch.where(batch["lead_ids"] <= 8, batch["lead_ids"], 13)}
    _agree(_logits(model, frank), _logits(model, kept))


@pytest.mark.parametrize("network", NETWORKS)
def test_padding_of_time_changes_nothing_whatever_it_holds(network):
    model, batch = _model(network), _batch(6)
    noise = _batch(10, seed=2)
    longer = {name: value.clone() for name, value in noise.items()}
    longer["input_values"][..., :1800] = batch["input_values"]
    longer["attention_mask"][..., 6:] = 0
    _agree(_logits(model, longer), _logits(model, batch))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_record_without_a_usable_patch_has_finite_logits(network):
    batch = _batch()
    batch["attention_mask"][0] = 0
    assert _logits(_model(network), batch).isfinite().all()


@pytest.mark.parametrize("rule", ["mean", "max"])
def test_the_logits_of_a_record_are_those_of_its_half_overlapping_windows_together(rule):
    model, batch = _model("xresnet1d101", aggregation=rule), _batch()
    starts = range(0, 2251, 375)  # 7 windows of 2.5 s
    parts = [
        _logits(model, {"input_values": batch["input_values"][..., s : s + 750], "lead_ids": batch["lead_ids"]})
        for s in starts
    ]
    expected = torch.stack(parts).mean(0) if rule == "mean" else torch.stack(parts).amax(0)
    _agree(_logits(model, batch), expected)


def test_windows_beyond_a_record_are_left_out_of_its_mean_and_maximum():
    channels = torch.arange(10.0).expand(2, 12, -1)
    windows, is_inside = cut(channels, torch.tensor([10, 5]), 4, 2)
    assert windows.shape == (2, 4, 12, 4) and windows[0, 2, 0].tolist() == [4, 5, 6, 7]
    assert is_inside.tolist() == [[True] * 4, [True, False, False, False]]
    per_window = torch.tensor([[1.0], [2.0], [3.0], [6.0], [-5.0]])
    assert aggregate(per_window, is_inside, "mean").tolist() == [[3], [-5]]
    assert aggregate(per_window, is_inside, "max").tolist() == [[6], [-5]]


def test_training_sees_every_window_of_a_record_and_nothing_behind_its_end():
    torch.manual_seed(0)
    channels = torch.arange(10.0).expand(400, 12, -1)
    windows = crop(channels, torch.tensor([6]).expand(400), 4)
    assert windows.shape == (400, 12, 4) and set(windows[:, 0, 0].tolist()) == {0, 1, 2}
    assert (windows[:, :, 3] - windows[:, :, 0] == 3).all()
    assert crop(channels[:1, :, :3], torch.tensor([3]), 4)[0, 0].tolist() == [0, 1, 2, 0]


def test_the_convolution_of_s4d_is_its_recurrence_in_both_directions():
    torch.manual_seed(0)
    layer = S4D(S4DConfig(hidden_size=3, state_size=6)).double()
    with torch.no_grad():
        layer.frequency.add_(torch.randn_like(layer.frequency))  # as training moves it
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    transition = torch.complex(-layer.log_decay.exp(), layer.frequency)
    factor = (layer.log_step.exp()[:, None] * transition).exp()
    readout = torch.view_as_complex(layer.readout)

    def states(x):
        h, result = torch.zeros(2, 3, 3, dtype=torch.complex128), []
        for t in range(x.shape[-1]):
            h = factor * h + (factor - 1) / transition * x[..., t, None]
            result.append(h)
        return result

    forwards, backwards = states(x), states(x.flip(-1))[::-1]
    for t in range(40):
        y = 2 * (readout[0] * forwards[t]).sum(-1).real + layer.skip * x[..., t]
        if t < 39:
            y = y + 2 * (readout[1] * backwards[t + 1]).sum(-1).real
        torch.testing.assert_close(layer(x)[..., t], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_saved_network_is_loaded_as_it_was(network, tmp_path):
    model = _model(network).train()
    model(**_batch())  # moves the statistics of the normalisation
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_the_recipes_name_networks_and_options_that_exist():
    for network in NETWORKS:
        model_args, *_, args = parse_recipe([str(FOLDER / f"{network}.yaml")], training.finetune.ARGUMENTS)
        assert model_args.preset == network and args.keep_best


def test_dense_attention_is_the_small_recipe_with_every_token_attending_to_all():
    recipe = yaml.safe_load((FOLDER / "dense_attention.yaml").read_text())
    small = yaml.safe_load((Path(training.finetune.__file__).parent / "recipes" / "small_statements.yaml").read_text())
    config = AnyECGConfig.from_preset(recipe["preset"], **recipe.pop("config"))
    assert {**recipe, "output_dir": small["output_dir"]} == small
    tokens = torch.ones(1, 2, config.max_patches, dtype=torch.bool)
    mask = cardio_sparse_mask(tokens, config.sparse_attention_config, implementation="sdpa", dtype=torch.float32)
    assert mask.all()


@pytest.mark.parametrize("options, what", [
    ({"preset": "small"}, "small"), ({"preset": "s4d", "init_from": "DIR"}, "scratch"),
    ({"preset": "s4d", "config": '{"widht": 1}'}, "widht"),
])  # fmt: skip
def test_what_no_baseline_has_is_an_error_that_names_it(options, what):
    task = build_task("superclass")
    with pytest.raises(ValueError, match=what):
        build_model(ModelArguments(**options), task, torch.ones(4, 5).numpy())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    argv = [
        "train", str(FOLDER / "xresnet1d101.yaml"), "--output_dir", str(folder / "run"), "--cache_dir", str(folder),
        "--num_proc", "1", "--config", json.dumps(SMALL["xresnet1d101"]), "--simulate", "18", "--max_steps", "4",
        "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2",
        "--per_device_train_batch_size", "4", "--disable_tqdm", "True",
    ]  # fmt: skip
    command.main(argv)
    return folder, argv


def test_a_killed_run_ends_as_one_left_alone_with_the_same_crops(trained):
    folder, argv = trained
    weights = (folder / "run" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "run" / "checkpoint-4")
    for name in ("run_finished.json", "results.json", "model.safetensors", "config.json"):
        (folder / "run" / name).unlink()
    command.main(argv)
    assert (folder / "run" / "model.safetensors").read_bytes() == weights


def test_evaluation_of_a_trained_baseline_repeats_its_figures_and_compares_it(trained, monkeypatch, capsys):
    folder, _ = trained
    sources = list_sources(DataArguments(simulate=18))
    monkeypatch.setenv("ANYECG_CACHE", str(folder))
    for module in ("evaluate", "compare"):
        monkeypatch.setattr(f"training.{module}.list_sources", lambda _: sources)
    run, output = str(folder / "run"), folder / "report.json"
    command.main(["evaluate", "--checkpoint", run, "--data", "DIR", "--output", str(output)])
    report = json.loads(output.read_text())
    figures = json.loads((folder / "run" / "results.json").read_text())["evaluation"]
    for name in ("macro_auroc", "ece"):
        assert report[name] == pytest.approx(figures[name], abs=1e-6)
    capsys.readouterr()
    command.main(["compare", "--data", "DIR", "--arm", "a", run, "--arm", "b", run, "--bootstrap", "2"])
    difference = json.loads(capsys.readouterr().out)["differences"]["b - a"]["macro_auroc"]
    assert difference["difference"] == 0


def test_speeds_are_given_beside_that_of_the_first_network(monkeypatch, capsys):
    monkeypatch.setattr(speed, "NUM_LABELS", 5)
    monkeypatch.setattr(speed, "build_networks", lambda: {name: _model(name).train() for name in ("net1d", "s4d")})
    speed.main(["--rounds", "1", "--seconds", "0", "--batch", "2"])
    first, second = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
    assert float(first[5]) == 1 and float(second[4]) > 0 and float(first[3]) > float(second[3])
