"""The three training commands from end to end, on simulated records and very small networks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSequenceClassification,
    EvalPrediction,
    pipeline,
)

import tokenization.train
import training.evaluate
import training.finetune
import training.long_records
import training.pretrain
import training.reconstruct
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.simulate import simulate_record
from tokenization.codebook_health import codebook_report, explained_variance, kmeans_report, perplexity_of
from training.arguments import AnyECGTrainingArguments, ModelArguments, parse_recipe
from training.checkpointing import write_json
from training.corpora.simulated import list_simulated
from training.data import DataArguments
from training.inference import embed_records, predict_logits
from training.kept_weights import BestWeights, WeightAverage
from training.labels import build_task
from training.metrics import task_metrics
from training.probe import STRENGTHS
from training.thresholds import choose_thresholds
from training.trainer import AnyECGTrainer, NonFiniteError, layer_of

RECIPES = Path(training.finetune.__file__).parent / "recipes"
METRICS = RECIPES.parent / "ecg_metrics"
NETWORK = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_dropout": 0.1,
    "stem_channels": [4, 4, 4, 4],
}
QUANTIZER = {
    **NETWORK,
    "stem_channels": [4, 4, 4],
    "num_decoder_layers": 1,
    "codebook_size": 16,
    "codebook_dim": 4,
}
STEPS = ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "3", "--logging_steps", "2", "--warmup_steps", "1"]
STEPS += ["--per_device_train_batch_size", "4", "--save_total_limit", "5", "--disable_tqdm", "True", "--simulate", "18"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def _argv(recipe, output_dir, cache, *options, network=NETWORK):
    return [
        str(RECIPES / recipe), "--output_dir", str(output_dir), "--cache_dir", str(cache), "--num_proc", "1",
        "--config", json.dumps(network), *STEPS, *options,
    ]  # fmt: skip


def _train_quantizer(output_dir, cache, *options):
    options = ["--codebook_start_step", "3", "--codebook_start_vectors", "500", "--health_records", "2", *options]
    tokenization.train.main(_argv("smoke_quantizer.yaml", output_dir, cache, *options, network=QUANTIZER))
    return output_dir


@pytest.fixture(scope="module")
def quantizer(cache, tmp_path_factory):
    return _train_quantizer(tmp_path_factory.mktemp("quantizer"), cache)


def _pretrain(output_dir, cache, quantizer, *options):
    options = ["--quantizer", str(quantizer), "--unigram_records", "8", *options]
    training.pretrain.main(_argv("smoke_pretrain.yaml", output_dir, cache, *options))
    return output_dir


@pytest.fixture(scope="module")
def backbone(cache, quantizer, tmp_path_factory):
    return _pretrain(tmp_path_factory.mktemp("backbone"), cache, quantizer)


def _finetune(output_dir, cache, *options):
    training.finetune.main(_argv("smoke_finetune.yaml", output_dir, cache, *options))
    return output_dir


@pytest.fixture(scope="module")
def classifier(cache, backbone, tmp_path_factory):
    return _finetune(tmp_path_factory.mktemp("classifier"), cache, "--init_from", str(backbone))


def _weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def _rewind(folder, steps):
    """Make a finished run look as if it had been killed after `steps`."""
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > steps:
            shutil.rmtree(checkpoint)
    for name in ("run_finished.json", "results.json", "model.safetensors", "config.json"):
        (Path(folder) / name).unlink()


def test_the_quantizer_command_ends_with_a_tokenizer_that_the_auto_classes_load(quantizer):
    model = AutoModel.from_pretrained(quantizer)
    extractor = AutoFeatureExtractor.from_pretrained(quantizer)
    signal = np.random.default_rng(0).normal(0, 0.3, (12, 1000))
    leads = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    codes = extractor(signal, sampling_rate=100, lead_names=leads, units="mV")["rhythm_codes"]
    assert type(model).__name__ == "AnyECGRhythmQuantizer" and np.asarray(codes).shape == (1, 12, 10)
    report = json.loads((quantizer / "results.json").read_text())
    assert {"fve", "usage", "perplexity"} <= set(report["codebook_health"]["quantizer"])


def test_the_pretraining_command_reports_each_mask_pattern_beside_the_code_frequencies(backbone):
    AnyECGForMaskedCodeModeling.from_pretrained(backbone)
    evaluation = json.loads((backbone / "results.json").read_text())["evaluation"]
    for pattern in ("random", "time", "lead"):
        assert evaluation[f"eval_{pattern}_cross_entropy"] == pytest.approx(
            evaluation[f"eval_{pattern}_loss"], rel=1e-2
        )
        assert {f"eval_{pattern}_unigram_cross_entropy", f"eval_{pattern}_unigram_accuracy"} <= set(evaluation)


def test_the_code_head_starts_at_the_log_frequencies_of_the_codes(quantizer, cache, tmp_path):
    instances = parse_recipe(
        _argv("smoke_pretrain.yaml", tmp_path, cache, "--quantizer", str(quantizer), "--unigram_records", "8"),
        training.pretrain.ARGUMENTS,
    )
    objective = training.pretrain.build_trainer(*instances).objective
    bias = objective.model.code_head.bias.detach()
    assert torch.equal(bias, objective.baselines.log_unigram) and bias.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert not any("quantizer" in name for name, _ in objective.named_parameters())


@pytest.mark.parametrize("objective, figure", [
    ("masked_codes", "lead_age_mae"), ("masked_waveform", "random_explained_power"),
    ("contrastive", "span_contrastive_accuracy"), ("latents", "time_latent_distance"),
])  # fmt: skip
def test_every_objective_ends_with_a_backbone_that_fine_tuning_starts_from(
    objective, figure, quantizer, cache, tmp_path
):
    network = {**NETWORK, "hidden_dropout": 0.0}
    options = ["--objective", objective, "--bf16", "True", "--quantizer", str(quantizer)]
    options += ["--demography_weight", "0.5"] if objective == "masked_codes" else []
    argv = _argv("smoke_pretrain.yaml", tmp_path, cache, *options, "--unigram_records", "8", network=network)
    training.pretrain.main(argv)
    whole = _weights(tmp_path)
    assert np.isfinite(json.loads((tmp_path / "results.json").read_text())["evaluation"][f"eval_{figure}"])
    _rewind(tmp_path, 4)
    training.pretrain.main(argv)
    assert _weights(tmp_path) == whole
    model = training.finetune.build_model(
        ModelArguments(init_from=str(tmp_path)), build_task("superclass"), np.full((4, 5), 0.5)
    )
    start = AnyECGModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in model.anyecg.state_dict().items())


def test_the_fine_tuning_command_ends_with_labels_thresholds_and_an_extractor(classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    config = AutoConfig.from_pretrained(classifier)
    assert config.num_labels == 71 and config.id2label[4] == "NORM" and config.label2id["NORM"] == 4
    assert len(config.thresholds) == 71 and config.problem_type == "multi_label_classification"
    assert model.classifier.bias.abs().max() > 2  # the log odds of rare labels
    assert AutoFeatureExtractor.from_pretrained(classifier).sampling_rate == 300
    assert not (classifier / "training_args.bin").exists()


def test_evaluation_of_the_saved_folder_repeats_the_figures_of_training(classifier, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYECG_CACHE", str(cache))
    monkeypatch.setattr("training.data.list_records", lambda folder: list_simulated(18))
    output = tmp_path / "results.json"
    training.evaluate.main(
        ["--checkpoint", str(classifier), "--data", str(tmp_path), "--bootstrap", "5", "--output", str(output)]
    )
    report = json.loads(output.read_text())
    trained = json.loads((classifier / "results.json").read_text())
    assert report["macro_auroc"] == pytest.approx(trained["evaluation"]["macro_auroc"])
    assert report["ece"] == pytest.approx(trained["evaluation"]["ece"], abs=1e-6)
    assert report["macro_f1"] == pytest.approx(trained["evaluation"]["macro_f1"], nan_ok=True)
    assert report["labels"]["NORM"]["positives"] > 0


@pytest.mark.parametrize(("weights", "task", "figure"), [
    ("trained", "statements", "macro_auroc"), ("random", "statements", "macro_auroc"), ("trained", "age", "mae"),
    ("trained", "sex", "macro_auroc"),
])  # fmt: skip
def test_a_linear_probe_scores_a_frozen_backbone(backbone, cache, tmp_path, monkeypatch, weights, task, figure):
    monkeypatch.setenv("ANYECG_CACHE", str(cache))
    monkeypatch.setattr("training.data.list_records", lambda folder: list_simulated(18))
    output = tmp_path / "probe.json"
    training.evaluate.main(
        [
            "--checkpoint",
            str(backbone),
            "--data",
            str(tmp_path),
            "--probe",
            weights,
            "--task",
            task,
            "--output",
            str(output),
        ]
    )
    report = json.loads(output.read_text())
    assert report["num_train"] == 16 and report[figure] > 0
    assert task != "age" or report["mae"] < 40  # years


@pytest.mark.parametrize("steps", [2, 4])
def test_a_quantizer_run_killed_before_or_after_the_codebook_starts_ends_bit_equal(quantizer, cache, tmp_path, steps):
    shutil.copytree(quantizer, tmp_path / "run")
    _rewind(tmp_path / "run", steps)
    _train_quantizer(tmp_path / "run", cache)
    assert _weights(tmp_path / "run") == _weights(quantizer)


def test_a_pretraining_run_killed_in_mid_epoch_ends_bit_equal(backbone, quantizer, cache, tmp_path):
    shutil.copytree(backbone, tmp_path / "run")
    _rewind(tmp_path / "run", 2)
    _pretrain(tmp_path / "run", cache, quantizer)
    assert _weights(tmp_path / "run") == _weights(backbone)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_fine_tuning_run_killed_in_mid_epoch_or_at_the_end_ends_bit_equal(cache, tmp_path, steps):
    options = ["--lead_subset_probability", "0.5", "--noise_mv", "0.02", "--gradient_accumulation_steps", "2"]
    whole = _finetune(tmp_path / "whole", cache, *options)
    shutil.copytree(whole, tmp_path / "killed")
    _rewind(tmp_path / "killed", steps)
    _finetune(tmp_path / "killed", cache, *options, "--dataloader_num_workers", "1")
    assert _weights(tmp_path / "killed") == _weights(whole)


def test_another_seed_gives_another_model(classifier, backbone, cache, tmp_path):
    other = _finetune(tmp_path, cache, "--init_from", str(backbone), "--seed", "1")
    assert _weights(other) != _weights(classifier)


def test_a_finished_run_says_so_and_is_left_alone(classifier, backbone, cache, caplog):
    before = _weights(classifier)
    with caplog.at_level("INFO"):
        _finetune(classifier, cache, "--init_from", str(backbone))
    assert "is finished (6 steps)" in caplog.text and _weights(classifier) == before


@pytest.mark.parametrize(
    ("task", "problem_type"),
    [("age", "regression"), ("sex", "single_label_classification"), ("superclass_single", "single_label_classification"),
     *((name, None) for name in ("superclass", "rhythm", "codes"))],
)  # fmt: skip
def test_other_tasks_train_and_save_their_labels(cache, tmp_path, task, problem_type):
    folder = _finetune(tmp_path, cache, "--task", task, "--bf16", "True", "--min_positives", "2")
    config = AutoConfig.from_pretrained(folder)
    assert config.problem_type == (problem_type or "multi_label_classification")
    if task == "age":  # in years, although it was trained on a standardised scale
        assert 20 < AutoModelForSequenceClassification.from_pretrained(folder).classifier.bias.item() < 90


@pytest.mark.parametrize("options", [[], ["--freeze_backbone", "True"]])
def test_the_age_in_the_pipelines_answer_is_years_and_misses_by_the_reported_error(cache, backbone, tmp_path, options):
    options = ["--task", "age", "--init_from", str(backbone), "--learning_rate", "0.05", "--simulate", "36", *options]
    folder = _finetune(tmp_path, cache, *options)
    classify = pipeline("ecg-classification", model=str(folder))
    held_out = [entry for entry in list_simulated(36) if entry.fold == 9]
    (found,) = classify(held_out[0].read())
    assert found["label"] == "age" and found["threshold"] is found["positive"] is None
    missed = [abs(classify(entry.read())[0]["score"] - entry.age) for entry in held_out]
    report = json.loads((folder / "results.json").read_text())["evaluation"]
    assert np.mean(missed) == pytest.approx(report["mae"], abs=0.05) and report["mae"] < 40


@pytest.fixture
def snomed_records(monkeypatch):
    """Simulated records with codes as in the Challenge's headers: sinus rhythm alone or atrial fibrillation."""
    import training.data

    def listed(num_records):
        entries = list_simulated(num_records)
        return [replace(each, codes=(("426783006",), ("164889003",))[i // 9 % 2]) for i, each in enumerate(entries)]

    monkeypatch.setattr(training.data, "list_simulated", listed)
    return listed


def test_telling_normal_from_abnormal_records_trains_and_no_finding_is_an_answer(
    snomed_records, cache, tmp_path, monkeypatch
):
    folder = _finetune(tmp_path / "classifier", cache, "--task", "anomaly", "--simulate", "36")
    results = json.loads((folder / "results.json").read_text())
    assert results["evaluation"]["classes_scored"] == 1 and 0 <= results["evaluation"]["macro_auroc"] <= 1
    classify = pipeline("ecg-classification", model=str(folder))
    record = simulate_record(seed=1)
    (found,) = classify(record)
    assert found["label"] == "abnormal" and found["threshold"] == classify.model.config.thresholds[0]
    for threshold, is_positive in ((0.0, True), (1.0, False)):
        assert classify(record, thresholds=threshold)[0]["positive"] is is_positive
    monkeypatch.setenv("ANYECG_CACHE", str(cache))
    monkeypatch.setattr("training.data.list_records", lambda folder: snomed_records(36))
    output = tmp_path / "results.json"
    training.evaluate.main(["--checkpoint", str(folder), "--data", str(tmp_path), "--output", str(output)])
    report = json.loads(output.read_text())
    assert (
        report["brier"] == pytest.approx(results["evaluation"]["brier"])
        and report["labels"]["abnormal"]["positives"] == 2
    )


def test_the_challenge_task_trains_and_thresholds_for_its_score_are_what_the_pipeline_uses(
    snomed_records, cache, tmp_path
):
    folder = _finetune(tmp_path / "classifier", cache, "--task", "challenge", "--simulate", "36")
    results = json.loads((folder / "results.json").read_text())
    assert results["evaluation"]["challenge_score"] >= results["calibration"]["challenge_score_by_f1"]
    findings = pipeline("ecg-classification", model=str(folder))(simulate_record(seed=1))
    config = AutoConfig.from_pretrained(folder)
    assert {each["label"]: each["threshold"] for each in findings} == dict(zip(config.label2id, config.thresholds))


def test_challenge_thresholds_are_moved_for_labels_with_positives_enough_and_raise_the_score():
    task, generator = build_task("challenge"), np.random.default_rng(0)
    logits = generator.normal(-1, 2, (300, 24))
    targets = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    targets[9:, 3] = 0  # too few for a threshold of its own
    model = SimpleNamespace(config=SimpleNamespace(thresholds=None))
    facts = training.finetune._set_thresholds(model, task, targets, logits)
    by_f1, _ = choose_thresholds(targets, 1 / (1 + np.exp(-logits)))
    assert facts["labels_with_pooled_threshold"] == [task.names[3]]
    assert model.config.thresholds[3] == by_f1[3] and model.config.thresholds != by_f1
    scores = [
        task_metrics(task, logits, targets, thresholds=each)["challenge_score"]
        for each in (by_f1, model.config.thresholds)
    ]
    assert scores[0] == pytest.approx(facts["challenge_score_by_f1"]) and scores[1] > scores[0]


def test_a_task_whose_records_are_all_negative_trains_and_says_that_nothing_can_be_scored(cache, tmp_path):
    """Of simulated records only those in sinus rhythm have a diagnostic statement: NORM."""
    folder = _finetune(tmp_path, cache, "--task", "anomaly")
    assert json.loads((folder / "results.json").read_text())["evaluation"]["classes_scored"] == 0
    assert AutoConfig.from_pretrained(folder).thresholds == [0.5]


def test_figures_during_training_are_those_of_the_metric_folder(cache, tmp_path):
    argv = _argv("smoke_finetune.yaml", tmp_path, cache)
    for task, is_single in (("sex", True), ("rhythm", False)):
        trainer, _ = training.finetune.build_trainer(
            *parse_recipe([*argv, "--task", task], training.finetune.ARGUMENTS)
        )
        targets = trainer.eval_dataset.targets
        generator = np.random.default_rng(0)
        logits = generator.normal(0, 2, (len(targets), trainer.model.config.num_labels)).astype(np.float32)
        figures = trainer.compute_metrics(EvalPrediction(logits, targets))
        metric = evaluate.load(str(METRICS), cache_dir=str(tmp_path / "metrics"))
        probabilities = torch.from_numpy(logits).double()
        probabilities = probabilities.softmax(-1) if is_single else probabilities.sigmoid()
        expected = metric.compute(predictions=probabilities.numpy(), references=targets)
        del expected["labels"]
        assert {name: figures[name] for name in expected} == pytest.approx(expected, nan_ok=True)
        assert {"macro_auroc", "macro_auprc", "brier", "ece", "accuracy"} <= set(expected)


def test_an_unknown_name_in_a_recipe_is_an_error_that_names_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1.0e-3\n")
    with pytest.raises(ValueError, match="'learning_rat'.*recipe.yaml.*'learning_rate'"):
        parse_recipe([str(recipe)], (AnyECGTrainingArguments,))


def test_an_unknown_name_on_the_command_line_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'max_step'.*command line.*'max_steps'"):
        parse_recipe([str(RECIPES / "smoke_finetune.yaml"), "--max_step", "3"], training.finetune.ARGUMENTS)


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 10\nlearning_rate: 1e-3\ndata: [a, b]\nbf16: true\nconfig: {hidden_size: 8}\n")
    model, data, args = parse_recipe(
        [str(recipe), "--max_steps", "20", "--data", "c"], (ModelArguments, DataArguments, AnyECGTrainingArguments)
    )
    assert args.max_steps == 20 and args.learning_rate == 1e-3 and args.bf16
    assert data.data == ["c"] and model.overrides() == {"hidden_size": 8}


def test_a_preset_beside_weights_to_start_from_is_refused_unless_it_is_the_recipes(tmp_path):
    recipe, classes = str(RECIPES / "smoke_finetune.yaml"), training.finetune.ARGUMENTS
    assert parse_recipe([recipe, "--init_from", "DIR"], classes)[0].init_from == "DIR"
    with pytest.raises(ValueError, match="--preset beside --init_from.*bring their own network.*--config"):
        parse_recipe([recipe, "--init_from", "DIR", "--preset", "base"], classes)
    (tmp_path / "recipe.yaml").write_text("init_from: DIR\npreset: tiny\n")
    with pytest.raises(ValueError, match="--preset beside --init_from"):
        parse_recipe([str(tmp_path / "recipe.yaml")], classes)


@pytest.mark.parametrize("module", [tokenization.train, training.pretrain, training.finetune])
def test_a_filter_other_than_that_of_the_weights_to_start_from_is_refused(module, quantizer, cache, tmp_path):
    stage = {tokenization.train: "quantizer", training.pretrain: "pretrain", training.finetune: "finetune"}[module]
    source = "--quantizer" if module is training.pretrain else "--init_from"
    argv = _argv(f"smoke_{stage}.yaml", tmp_path, cache, source, str(quantizer), "--lowcut_hz", "2.0", network={})
    with pytest.raises(ValueError, match=f"--lowcut_hz 2.0: {source} .* brings its own extractor, with lowcut_hz 0.5"):
        module.main(argv)


def test_a_configuration_is_changed_beside_weights_to_start_from(quantizer, backbone, cache, tmp_path):
    argv = _argv("smoke_quantizer.yaml", tmp_path, cache, "--init_from", str(quantizer), network={"ema_decay": 0.5})
    trainer = tokenization.train.build_trainer(*parse_recipe(argv, tokenization.train.ARGUMENTS))
    assert trainer.model.config.ema_decay == 0.5
    model = training.pretrain.build_model(
        ModelArguments(init_from=str(backbone), config='{"hidden_dropout": 0.3}'), "masked_waveform"
    )
    assert model.config.hidden_dropout == 0.3


def test_a_command_without_a_recipe_says_how_to_give_one(tmp_path):
    with pytest.raises(ValueError, match="first argument must be a recipe"):
        parse_recipe(["--max_steps", "3"], (AnyECGTrainingArguments,))
    with pytest.raises(ValueError, match="There is no recipe"):
        parse_recipe([str(tmp_path / "absent.yaml")], (AnyECGTrainingArguments,))


def test_help_lists_the_options_of_all_parts(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_recipe(["--help"], training.finetune.ARGUMENTS)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in text for name in ("RECIPE.yaml", "--data", "--task", "--layer_decay", "--max_steps"))


_CLASSES = {
    "quantizer": tokenization.train.ARGUMENTS,
    "pretrain": training.pretrain.ARGUMENTS,
    "finetune": training.finetune.ARGUMENTS,
    "statements": training.finetune.ARGUMENTS,
    "reconstruction": training.reconstruct.ARGUMENTS,
    "long": training.long_records.ARGUMENTS,
}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_understood_and_names_data_or_can_do_without(recipe):
    _, *_, args = instances = parse_recipe([str(recipe)], _CLASSES[recipe.stem.rpartition("_")[2]])
    data = next(instance for instance in instances if isinstance(instance, DataArguments))
    assert recipe.stem.startswith("smoke") == bool(data.simulate)
    assert args.logging_nan_inf_filter is False


class _Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x=None, labels=None):
        return {"loss": (self.weight * x).sum() / labels.sum()}


def _line_trainer(tmp_path, zero_at):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, key):
            return {"x": torch.ones(2), "labels": torch.tensor(1.0)}

    seen = []

    def collate(items):
        seen.append(len(items))
        label = 0.0 if len(seen) == zero_at else 1.0
        return {"x": torch.ones(2), "labels": torch.tensor([label])}

    args = AnyECGTrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, save_steps=2, disable_tqdm=True
    )
    return AnyECGTrainer(_Line(), args, train_dataset=Rows(), data_collator=collate)


def test_training_stops_at_the_first_loss_that_is_not_finite_and_names_the_step(tmp_path):
    with pytest.raises(NonFiniteError, match="loss of step 4 is inf"):
        _line_trainer(tmp_path, zero_at=4).train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-4").exists()


def test_training_stops_at_a_gradient_that_is_not_finite_before_it_is_applied(tmp_path):
    trainer = _line_trainer(tmp_path, zero_at=0)
    trainer.model.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="gradient of step 1"):
        trainer.train()
    assert torch.equal(trainer.model.weight.detach(), torch.ones(2))


@pytest.mark.parametrize("objective", ["contrastive", "latents"])
def test_deepspeed_in_bf16_is_refused_where_weights_must_be_float32(tmp_path, cache, objective):
    argv = _argv("smoke_pretrain.yaml", tmp_path, cache, "--objective", objective, "--bf16", "True")
    instances = parse_recipe(argv, training.pretrain.ARGUMENTS)
    instances[-1].deepspeed_plugin = object()
    with pytest.raises(ValueError, match=f"{objective} by DeepSpeed in bf16: not accepted.*FSDP2"):
        training.pretrain.build_trainer(*instances)


def test_samples_stay_in_float32_under_deepspeed_of_which_codes_are_made(tmp_path):
    """The library casts them to bf16 there; the third step's loss was another than with stored codes."""
    trainer = _line_trainer(tmp_path, zero_at=0)
    trainer.is_deepspeed_enabled = True
    assert trainer._prepare_inputs({"input_values": torch.ones(2)})["input_values"].dtype == torch.float32


def test_a_user_error_ends_the_command_with_one_line_and_code_one(monkeypatch, capsys):
    from training.commands import run_command

    def main(argv):
        raise ValueError("no such lead")

    monkeypatch.delenv("ANYECG_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert "error: no such lead" in str(stop.value)


def test_layer_decay_gives_lower_layers_a_lower_rate(backbone, cache, tmp_path):
    instances = parse_recipe(
        _argv("smoke_finetune.yaml", tmp_path, cache, "--init_from", str(backbone), "--layer_decay", "0.5"),
        training.finetune.ARGUMENTS,
    )
    trainer, _ = training.finetune.build_trainer(*instances)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        for value in group["params"]:
            rates[id(value)] = group["lr"] / trainer.args.learning_rate
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    named = {name: rates[id(value)] for name, value in trained.items()}
    assert len(rates) == len(trained)
    assert named["classifier.weight"] == named["anyecg.encoder.norm.weight"] == 1.0
    assert {rate for name, rate in named.items() if layer_of(name) == 2} == {0.5}
    assert {rate for name, rate in named.items() if layer_of(name) == 0} == {0.125}


def test_biases_norms_and_embeddings_do_not_decay(backbone, cache, tmp_path):
    trainer, _ = training.finetune.build_trainer(
        *parse_recipe(_argv("smoke_finetune.yaml", tmp_path, cache), training.finetune.ARGUMENTS)
    )
    names = trainer.get_decay_parameter_names(trainer.model)
    assert "classifier.weight" in names
    assert not [name for name in names if "bias" in name or "norm" in name or "embedding." in name or "scale" in name]


def test_the_average_of_the_weights_follows_its_formula_and_gives_the_weights_back():
    model = torch.nn.Linear(2, 1, bias=False)
    average = WeightAverage(model, 0.5)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model, step=1)  # decay min(0.5, 2/11)
    expected = start * (2 / 11) + (start + 1) * (9 / 11)
    with average.applied_to(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    torch.testing.assert_close(model.weight.detach(), start + 1)


def test_the_best_weights_are_kept_whatever_comes_after_and_survive_a_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 1)
    best = BestWeights("macro_auroc", greater_is_better=True)
    for step, figure in ((1, float("nan")), (2, 0.7), (3, 0.9), (4, 0.8)):
        with torch.no_grad():
            model.weight.fill_(step)
        best.note(model, {"eval_macro_auroc": figure}, step=step)
    best.save(tmp_path / "best.safetensors")
    loaded = BestWeights("macro_auroc", greater_is_better=True)
    loaded.load(tmp_path / "best.safetensors")
    assert (loaded.figure, loaded.step, loaded.evaluated_step) == (0.9, 3, 4)
    assert loaded.values["weight"].eq(3).all()


def test_the_best_state_holds_what_is_not_trained_too(tmp_path):
    model = torch.nn.BatchNorm1d(2)
    model.bias.requires_grad_(False)
    best = BestWeights("loss", greater_is_better=False)
    best.note(model, {"eval_loss": 1.0}, step=1)
    best.save(tmp_path / "best.safetensors")
    loaded = BestWeights("loss", greater_is_better=False)
    loaded.load(tmp_path / "best.safetensors")
    with torch.no_grad():
        model.weight.fill_(5), model.bias.fill_(5), model.running_mean.fill_(5), model.num_batches_tracked.fill_(5)
    loaded.put_into(model)
    assert model.weight.eq(1).all() and model.bias.eq(0).all()
    assert model.running_mean.eq(0).all() and model.num_batches_tracked.eq(0)


def test_best_weights_without_buffers_as_an_earlier_version_kept_them_are_refused(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "best.safetensors", metadata={"facts": "[0.5, 1, 1]"})
    with pytest.raises(ValueError, match="best.safetensors is of an earlier version.*new --output_dir"):
        BestWeights("loss", greater_is_better=False).load(tmp_path / "best.safetensors")


def test_a_run_none_of_whose_evaluations_can_be_the_best_says_that_it_ends_with_the_last_weights(tmp_path, caplog):
    trainer = _line_trainer(tmp_path, zero_at=0)
    trainer.best = BestWeights("macro_auroc", greater_is_better=True)
    trainer.best.note(trainer.model, {"eval_macro_auroc": float("nan")}, step=1)
    trainer.take_final_weights()
    assert "no evaluation gave a finite macro_auroc, the run ends with the last weights" in caplog.text


KEEP_FIRST = [
    "--eval_steps",
    "2",
    "--keep_best",
    "True",
    "--greater_is_better",
    "True",
]  # the loss falls: the first is kept


@pytest.mark.parametrize(("stage", "options", "finished"), [
    ("quantizer", ["--weight_average_decay", "0"], ""),
    ("quantizer", ["--weight_average_decay", "0.5"], ""),
    ("masked_codes", ["--weight_average_decay", "0.5"], "model."),
    ("latents", ["--weight_average_decay", "0"], "teacher."),
    ("finetune", ["--weight_average_decay", "0.5"], ""),
])  # fmt: skip
def test_the_best_model_is_written_whole_and_the_results_are_its_own(
    quantizer, cache, tmp_path, stage, options, finished
):
    options = [*KEEP_FIRST, *options, "--metric_for_best_model", "random_loss" if finished else "loss"]
    if stage == "quantizer":
        _train_quantizer(tmp_path, cache, *options, "--codebook_start_step", "1")
    elif stage == "finetune":
        _finetune(tmp_path, cache, *options)
    else:
        _pretrain(tmp_path, cache, quantizer, *options, "--objective", stage)
    report = json.loads((tmp_path / "results.json").read_text())
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    kept = load_file(tmp_path / "checkpoint-6" / "best.safetensors")
    assert report["best_step"] == 2
    assert set(kept) == set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    figures = report["evaluation"]
    if (
        stage == "finetune"
    ):  # temperature and thresholds come after what was logged, and move all but the order of scores
        figures = {name: value for name, value in figures.items() if "auroc" in name or "auprc" in name}
    _same_as_logged(figures, [entry for entry in history if entry["step"] == 2])
    if stage != "finetune":  # the head of which is completed
        written = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(value, kept[finished + name]) for name, value in written.items())
    for name, value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").items():
        if "codebook" in name or name.startswith("teacher."):  # no average is made of these
            assert torch.equal(kept[name], value), name


def test_the_best_tokenizer_is_none_from_before_its_codebook_started(cache, tmp_path):
    options = [*KEEP_FIRST, "--metric_for_best_model", "loss", "--codebook_start_step", "3"]
    _train_quantizer(tmp_path, cache, *options)
    assert json.loads((tmp_path / "results.json").read_text())["best_step"] == 4


def test_a_quantizer_run_that_ends_before_its_codebook_starts_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="--codebook_start_step 6: the run ends at step 6, before.*random"):
        _train_quantizer(tmp_path, cache, "--codebook_start_step", "6")


def test_keep_best_without_a_figure_to_choose_by_is_refused_before_training(cache, tmp_path):
    with pytest.raises(ValueError, match="--keep_best needs --metric_for_best_model"):
        _train_quantizer(tmp_path, cache, "--keep_best", "True")


@pytest.mark.parametrize(("name", "greater"), [
    ("macro_auroc", True), ("fve", True), ("perplexity", True), ("random_accuracy", True), ("loss", False), ("mae", False),
    ("random_cross_entropy", False), ("time_latent_distance", False), ("lead_age_mae", False), (None, None),
])  # fmt: skip
def test_whether_more_of_a_figure_is_better_follows_from_its_name_unless_it_is_said(tmp_path, name, greater):
    args = AnyECGTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=name)
    assert args.greater_is_better is greater
    said = AnyECGTrainingArguments(output_dir=str(tmp_path), metric_for_best_model="mae", greater_is_better=True)
    assert said.greater_is_better is True


def _same_as_logged(figures, logged):
    """Compare an evaluation with what was logged of it; those of the completed head lack the beginning of the name."""
    entries = {name: value for entry in logged for name, value in entry.items()}
    common = {name: value for name, value in figures.items() if name in entries and value is not None}
    common |= {
        f"eval_{name}": value for name, value in figures.items() if f"eval_{name}" in entries and value is not None
    }
    assert common
    for name, value in common.items():
        assert value == pytest.approx(entries[name], rel=1e-4, abs=1e-6), name


def test_a_checkpoint_before_the_first_evaluation_has_no_best_weights(tmp_path):
    best = BestWeights("macro_auroc", greater_is_better=True)
    best.save(tmp_path / "best.safetensors")
    best.load(tmp_path / "best.safetensors")
    assert best.step is None and best.values == {}


def test_an_unknown_figure_to_choose_by_is_an_error_that_lists_the_known_ones():
    best = BestWeights("auroc", greater_is_better=True)
    with pytest.raises(ValueError, match="'auroc'.*eval_macro_auroc"):
        best.note(torch.nn.Linear(1, 1), {"eval_macro_auroc": 0.5}, step=1)


def test_results_are_valid_json_even_where_a_figure_is_not_a_number(tmp_path):
    write_json(tmp_path / "results.json", {"auroc": float("nan"), "parts": [float("inf"), 1.0]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"auroc": None, "parts": [None, 1.0]}


def test_codebook_figures_of_a_perfect_and_of_a_useless_code():
    generator = np.random.default_rng(0)
    centers = generator.normal(0, 1, (4, 30)).astype(np.float32)
    codes = generator.integers(0, 4, 400)
    patches = centers[codes]
    assert explained_variance(patches, patches) == 1.0
    assert explained_variance(patches, np.full_like(patches, patches.mean())) == pytest.approx(0, abs=1e-6)
    assert perplexity_of(np.array([0.25, 0.25, 0.25, 0.25])) == pytest.approx(4)
    report = kmeans_report(patches + 0.01 * generator.normal(size=patches.shape).astype(np.float32), patches, 16)
    assert report["fve"] > 0.9 and 0 < report["usage"] <= 1


def test_the_report_of_a_codebook_splits_the_patches_by_their_range():
    from tokenization.codebook_health import CodedPatches

    sizes = np.repeat([0.1, 1.0, 10.0], 20)[:, None]
    patches = (sizes * np.sin(np.linspace(0, 6, 30))).astype(np.float32)
    report = codebook_report(CodedPatches(patches, patches * (sizes > 0.5), np.arange(60) % 4), 8)
    assert report["fve_low_range"] < 0.1 and report["fve_high_range"] == pytest.approx(1)
    assert report["usage"] == 0.5 and report["biggest_code"] == 0.25


def test_codes_are_learned_beside_age_sex_and_beats_and_all_are_evaluated(quantizer, cache, tmp_path):
    _pretrain(tmp_path, cache, quantizer, "--demography_weight", "0.5", "--beat_weight", "3")
    figures = json.loads((tmp_path / "results.json").read_text())["evaluation"]
    for pattern in ("random", "time", "lead"):
        for name in ("cross_entropy", "age_mae", "sex_accuracy", "beats_explained", "rhythm_explained"):
            assert np.isfinite(figures[f"eval_{pattern}_{name}"])
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    logged = next(entry for entry in history if "loss_beats" in entry)
    parts = logged["loss_codes"] + 0.5 * logged["loss_demography"] + 3 * logged["loss_beats"]
    assert logged["loss"] == pytest.approx(parts, rel=1e-4)


def test_pretraining_without_the_loss_of_codes_ends_as_a_backbone_without_a_code_head(quantizer, cache, tmp_path):
    _pretrain(tmp_path, cache, quantizer, "--code_weight", "0", "--beat_weight", "3", "--max_steps", "2")
    assert type(AutoModel.from_pretrained(tmp_path)) is AnyECGModel
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["AnyECGModel"]
    assert not any("code_head" in name for name in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="missing weights.*code_head"):
        AnyECGForMaskedCodeModeling.from_pretrained(tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    (["--beat_weight", "-1"], "--beat_weight -1.0: accepted are 0"),
    (["--code_weight", "0"], "leaves nothing to learn"),
    (["--objective", "latents", "--beat_weight", "1"], "--beat_weight belongs to --objective masked_codes"),
    (["--objective", "latents", "--weight_average_decay", "0.9"], "teacher"),
])  # fmt: skip
def test_options_of_another_objective_are_refused(quantizer, cache, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _pretrain(tmp_path, cache, quantizer, *options)


def test_a_head_can_start_as_a_linear_probe_of_the_backbone(backbone, cache, tmp_path):
    argv = _argv("smoke_finetune.yaml", tmp_path, cache, "--init_from", str(backbone), "--head_start", "probe")
    trainer, _ = training.finetune.build_trainer(*parse_recipe(argv, training.finetune.ARGUMENTS))
    train = trainer.train_dataset
    logits = predict_logits(trainer.model, train, trainer.data_collator)
    states = embed_records(trainer.model.anyecg, train, trainer.data_collator)
    features = torch.nn.functional.layer_norm(torch.from_numpy(states), states.shape[1:], eps=1e-6).numpy()
    label = int(np.abs(train.targets.mean(0) - 0.5).argmin())
    decided = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
        .fit(features, train.targets[:, label])
        .decision_function(features)
        for strength in STRENGTHS
    ]
    assert min(np.abs(logits[:, label] - each).max() for each in decided) < 1e-2
    assert torch.equal(
        AnyECGModel.from_pretrained(backbone).state_dict()["encoder.norm.weight"],
        trainer.model.anyecg.encoder.norm.weight,
    )


def test_the_probe_that_a_head_starts_from_is_that_of_the_first_process(backbone, cache, tmp_path, monkeypatch):
    """In shards each process kept its own rows of its own head."""
    sent = SimpleNamespace(weight=np.full((71, 16), 0.25), bias=np.arange(71.0))
    monkeypatch.setattr(training.finetune, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(training.finetune, "broadcast_object_list", lambda objects: [objects[0] or sent])
    argv = _argv("smoke_finetune.yaml", tmp_path, cache, "--init_from", str(backbone), "--head_start", "probe")
    trainer, _ = training.finetune.build_trainer(*parse_recipe(argv, training.finetune.ARGUMENTS))
    head = trainer.model.classifier
    assert (head.weight == 0.25).all() and head.bias.tolist() == list(range(71))


def test_a_frozen_backbone_keeps_its_weights_and_only_the_head_has_gradients_and_optimizer_state(
    backbone, cache, tmp_path
):
    argv = _argv("smoke_finetune.yaml", tmp_path, cache, "--init_from", str(backbone), "--freeze_backbone", "True")
    trainer, _ = training.finetune.build_trainer(*parse_recipe(argv, training.finetune.ARGUMENTS))
    trainer.train()
    trained = {name for name, value in trainer.model.named_parameters() if value in trainer.optimizer.state}
    assert trained == {"pooled_norm.weight", "pooled_norm.bias", "classifier.weight", "classifier.bias"}
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == trained
    start = AnyECGModel.from_pretrained(backbone).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.anyecg.state_dict().items())
    batch = {name: value for name, value in next(iter(trainer.get_train_dataloader())).items() if name != "labels"}
    first, second = (trainer.model.train()(**batch).logits for _ in range(2))
    assert torch.equal(first, second)  # no dropout, of which the recipe has 0.1


@pytest.mark.parametrize("options", [[], ["--layer_decay", "0.5", "--weight_average_decay", "0.9"]])
def test_a_frozen_run_killed_in_mid_epoch_ends_bit_equal_with_only_its_head_trained(backbone, cache, tmp_path, options):
    options = ["--init_from", str(backbone), "--freeze_backbone", "True", *options]
    whole = _finetune(tmp_path / "whole", cache, *options)
    shutil.copytree(whole, tmp_path / "killed")
    _rewind(tmp_path / "killed", 2)
    assert _weights(_finetune(tmp_path / "killed", cache, *options)) == _weights(whole)
    start, end = (load_file(Path(folder) / "model.safetensors") for folder in (backbone, whole))
    kept = [name for name in end if name.startswith("anyecg.")]
    assert kept and all(torch.equal(end[name], start[name]) for name in kept)


def test_a_network_that_is_not_divided_cannot_be_frozen():
    with pytest.raises(ValueError, match="a Linear is not divided into backbone and head"):
        training.finetune.freeze_backbone(torch.nn.Linear(2, 2))


def test_the_head_of_a_value_can_start_as_a_linear_regression_on_the_scale_that_it_is_trained_on(
    backbone, cache, tmp_path
):
    options = ["--init_from", str(backbone), "--head_start", "probe", "--task", "age"]
    argv = _argv("smoke_finetune.yaml", tmp_path, cache, *options)
    trainer, _ = training.finetune.build_trainer(*parse_recipe(argv, training.finetune.ARGUMENTS))
    targets = trainer.train_dataset.targets
    assert abs(targets.mean()) < 1e-5 and targets.std() == pytest.approx(1, abs=1e-5)
    told = predict_logits(trainer.model, trainer.train_dataset, trainer.data_collator)
    assert abs(told.mean()) < 1e-3 and ((told - targets) ** 2).mean() < 1  # better than the mean


def test_an_unknown_head_start_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="--head_start 'best' is unknown"):
        _finetune(tmp_path, cache, "--head_start", "best")
