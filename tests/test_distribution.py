"""Several processes train what one trains: the commands in two processes against the same batch in one.

Adam's epsilon is 1e-4: with a smaller one it would divide rounding noise by itself, in weights whose gradient is zero by
construction (the biases of `key_norm`: a softmax does not see them).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import tokenization.encode
import tokenization.train
import training.finetune
import training.pretrain
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.vector_quantizer import CosineVectorQuantizer
from training.data import EpochSampler

RECIPES = Path(training.finetune.__file__).parent / "recipes"
NETWORK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "stem_channels": [8, 8, 8, 8]}
QUANTIZER = NETWORK | {
    "stem_channels": [8, 8, 8], "num_decoder_layers": 1, "codebook_size": 16, "codebook_dim": 4,
    "dead_code_steps": 1, "dead_code_share": 0.9,
}  # fmt: skip
OBJECTIVES = ("record_losses", "masked_waveform", "latents")
# "record_losses": masked codes with the losses of the whole record, shifted so far that some have no beats to tell
RECORD_LOSSES = ["--beat_weight", "3", "--demography_weight", "0.5", "--max_shift_seconds", "9"]
IN_BF16 = ("record_losses", "contrastive", "finetune")
PLAIN = ["--weight_average_decay", "0", "--keep_best", "False"]  # as under FSDP
PROBE = ["--head_start", "probe", *PLAIN]
MAINS = {"tokenization.train": tokenization.train, "training.pretrain": training.pretrain,
         "training.finetune": training.finetune}  # fmt: skip
WHOLE, ACCUMULATED, TWO, TWO_ACCUMULATED = (1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2)  # processes, batch, accumulation


def _name(stage, division):
    return f"{stage}-" + "x".join(map(str, division))


def _run(folder, stage, division, *options, name=None):
    """Return [module, arguments] of a run of 6 steps of 8 of 29 records, with 1, 2, 3, 6, 8 or 12 leads."""
    processes, batch, accumulation = division
    network, module, recipe = NETWORK, "training.pretrain", "smoke_pretrain.yaml"
    if stage in ("ema", "gradient"):
        network, module, recipe = QUANTIZER | {"codebook_update": stage}, "tokenization.train", "smoke_quantizer.yaml"
        options = ["--codebook_start_step", "3", "--codebook_start_vectors", "500", "--health_records", "0", *options]
    elif stage == "finetune":
        module, recipe = "training.finetune", "smoke_finetune.yaml"
    else:
        objective = ["masked_codes", *RECORD_LOSSES] if stage == "record_losses" else [stage]
        options = ["--objective", *objective, "--unigram_records", "8", *options]
        options += ["--quantizer", str(folder / _name("ema", WHOLE))]
    eval_steps = "3" if stage == "finetune" else "6"  # of two the better one is chosen
    argv = [
        str(RECIPES / recipe), "--output_dir", str(folder / (name or _name(stage, division))),
        "--cache_dir", str(folder / "cache"), "--num_proc", "1", "--config", json.dumps(network),
        "--simulate", "40", "--max_train_records", "29", "--max_eval_records", "3", "--lead_subset_probability", "0.5",
        "--max_steps", "6", "--save_steps", "3", "--eval_steps", eval_steps, "--logging_steps", "1", "--warmup_steps", "1",
        "--adam_epsilon", "1e-4", "--per_device_train_batch_size", str(batch), "--disable_tqdm", "True",
        "--gradient_accumulation_steps", str(accumulation), "--per_device_eval_batch_size", str(2 // processes),
    ]  # fmt: skip
    return [module, [*argv, *options]]


def _launch(folder, runs, *configuration):
    spec = folder / "spec.json"
    spec.write_text(json.dumps(runs))
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("distribution_run.py")), str(spec), *map(str, configuration)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of each stage in one process, with the batch whole and in two micro-batches."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [_run(folder, stage, WHOLE) for stage in ("ema", "gradient", *OBJECTIVES, "contrastive", "finetune")]
    runs.append(_run(folder, "finetune", ACCUMULATED))
    for module, argv in runs:
        MAINS[module].main(argv)
    return folder


@pytest.fixture(scope="module")
def in_two(folder):
    runs = [_run(folder, stage, TWO) for stage in ("ema", "gradient", *OBJECTIVES, "contrastive", "finetune")]
    runs += [_run(folder, stage, TWO_ACCUMULATED) for stage in ("latents", "record_losses")]
    checkpointing = ["--gradient_checkpointing", "True"]
    runs.append(_run(folder, "finetune", TWO, *checkpointing, name="finetune-checkpointing"))
    return _launch(folder, runs)


def _history(run):
    return json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]


def _losses(run):
    return [
        {
            name: x
            for name, x in entry.items()
            if name.startswith("loss") or name in ("usage", "perplexity", "grad_norm")
        }
        for entry in _history(run)
        if "loss" in entry
    ]


def _figures(run):
    ignored = ("_runtime", "_per_second", "_preparation_time")
    return [
        {
            name: float("nan") if x is None else x  # JSON has no NaN, the figure of a class without positives
            for name, x in entry.items()
            if name.startswith("eval_") and not name.endswith(ignored)
        }
        for entry in _history(run)
        if any(name.startswith("eval_") for name in entry)
    ]


def _assert_same_run(run, reference, *, rel=1e-5):
    for found, expected in zip(_losses(run), _losses(reference), strict=True):
        assert found == pytest.approx(expected, rel=rel)
    for found, expected in zip(_figures(run), _figures(reference), strict=True):
        assert found == pytest.approx(expected, rel=10 * rel, nan_ok=True)
    weights, expected = load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=rel, atol=2e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("stage", ["ema", "gradient", *OBJECTIVES, "finetune"])
def test_two_processes_train_what_one_trains_with_the_same_batch(folder, in_two, stage):
    _assert_same_run(folder / _name(stage, TWO), folder / _name(stage, WHOLE))


@pytest.mark.parametrize("stage, division", [
    ("finetune", ACCUMULATED), ("latents", TWO_ACCUMULATED), ("record_losses", TWO_ACCUMULATED),
])  # fmt: skip
def test_micro_batches_train_what_the_whole_batch_trains(folder, in_two, stage, division):
    _assert_same_run(folder / _name(stage, division), folder / _name(stage, WHOLE))


def test_codes_die_and_are_moved_in_these_runs(folder):
    """Else the runs would say nothing about the choice of the vectors that dead codes are moved to."""
    assert load_file(folder / _name("ema", WHOLE) / "model.safetensors")["vector_quantizer.num_restarts"] > 3


def test_the_best_step_is_the_same_in_two_processes(folder, in_two):
    reports = [json.loads((folder / _name("finetune", d) / "results.json").read_text()) for d in (WHOLE, TWO)]
    assert reports[0]["best_step"] == reports[1]["best_step"]
    assert reports[0]["records_seen"] == reports[1]["records_seen"] == 48


def test_the_records_seen_are_those_of_the_processes_that_trained(folder, in_two):
    """One process may write the results of a run that several have trained: it counted its own batches alone."""
    trained, finished = folder / _name("finetune", TWO), folder / "finished-finetune"
    shutil.copytree(trained / "checkpoint-6", finished / "checkpoint-6")
    shutil.copy(trained / "run_arguments.json", finished)
    module, argv = _run(folder, "finetune", TWO, name=finished.name)
    MAINS[module].main(argv)
    assert json.loads((finished / "results.json").read_text())["records_seen"] == 48


def test_contrast_over_two_processes_differs_by_its_noise_only(folder, in_two):
    """Its loss was twice as large in two processes: means were taken for shares of a sum."""
    one, two = (_losses(folder / _name("contrastive", division)) for division in (WHOLE, TWO))
    for found, expected in zip(two, one, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.1)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.3)


def test_activation_checkpointing_in_two_processes_changes_nothing(folder, in_two):
    _assert_same_run(folder / "finetune-checkpointing", folder / _name("finetune", TWO))


@pytest.fixture(scope="module")
def in_shards(folder):
    """Runs under FSDP2 with the project's configuration file, and one that goes on from the middle."""
    runs = [_run(folder, "latents", TWO, "--gradient_checkpointing", "True", name="shards-latents")]
    runs += [_run(folder, "record_losses", TWO, name="shards-record_losses")]
    runs += [_run(folder, "finetune", TWO, *PROBE, name="shards-finetune")]
    runs += [["copy", [str(folder / "shards-latents" / "checkpoint-3"), str(folder / "resumed" / "checkpoint-3")]]]
    runs += [_run(folder, "latents", TWO, "--gradient_checkpointing", "True", name="resumed")]
    return _launch(folder, runs, RECIPES / "fsdp2.yaml")


@pytest.mark.parametrize("objective", ["latents", "record_losses"])
def test_weights_in_shards_train_to_the_same_model(folder, in_shards, objective):
    _assert_same_run(folder / f"shards-{objective}", folder / _name(objective, WHOLE))


def test_fine_tuning_in_shards_starts_from_the_probe_that_one_process_fits(folder, in_shards):
    module, argv = _run(folder, "finetune", WHOLE, *PROBE, name="probe")
    MAINS[module].main(argv)
    _assert_same_run(folder / "shards-finetune", folder / "probe")


def test_a_run_in_shards_that_was_stopped_goes_on_from_its_checkpoint(folder, in_shards):
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("shards-latents", "resumed"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_the_results_of_a_run_in_shards_can_be_written_by_one_process(folder, in_shards):
    shutil.copytree(folder / "shards-record_losses" / "checkpoint-6", folder / "finished" / "checkpoint-6")
    module, argv = _run(folder, "record_losses", WHOLE, name="finished")
    MAINS[module].main(argv)
    written, expected = (
        load_file(folder / name / "model.safetensors") for name in ("finished", "shards-record_losses")
    )
    assert all(torch.equal(value, expected[name]) for name, value in written.items())


def test_a_model_trained_in_shards_is_an_ordinary_one(folder, in_shards):
    model = AnyECGModel.from_pretrained(folder / "shards-latents")
    assert type(AutoModel.from_pretrained(folder / "shards-latents")) is AnyECGModel
    assert all(type(value) is torch.nn.Parameter for value in model.parameters())
    report = json.loads((folder / "shards-finetune" / "results.json").read_text())
    assert 0 <= report["evaluation"]["macro_f1" if "macro_f1" in report["evaluation"] else "macro_auroc"] <= 1


@pytest.fixture(scope="module")
def in_bf16_shards(folder):
    """Runs under FSDP2 in bf16: of each objective, and of masked codes from the quantizer and the same codes stored."""
    encode = ["--checkpoint", str(folder / _name("ema", WHOLE)), "--out", str(folder / "codes"), "--simulate", "40"]
    tokenization.encode.main([*encode, "--num_proc", "1", "--cache_dir", str(folder / "cache")])
    whole = ["--lead_subset_probability", "0", "--max_shift_seconds", "0"]
    runs = [_run(folder, "masked_codes", TWO, *whole, name="bf16-computed")]
    runs += [_run(folder, "masked_codes", TWO, *whole, "--codes", str(folder / "codes"), name="bf16-stored")]
    runs += [_run(folder, stage, TWO, name=f"bf16-{stage}") for stage in IN_BF16[:-1]]
    runs += [_run(folder, "finetune", TWO, *PLAIN, name="bf16-finetune")]
    return _launch(folder, runs, RECIPES / "fsdp2.yaml", "bf16")


def test_codes_in_bf16_shards_are_those_of_samples_that_were_not_rounded(folder, in_bf16_shards):
    """FSDP2 casts what it passes to a model: 7 of 7,200 codes were others than those stored."""
    assert _losses(folder / "bf16-computed") == _losses(folder / "bf16-stored")


def test_sums_of_evaluations_in_bf16_shards_are_not_rounded(folder, in_bf16_shards):
    of_codes = ("unigram_cross_entropy", "unigram_accuracy", "lead_copy_accuracy")  # and masks, not of the network
    found, expected = (
        [{name: x for name, x in entry.items() if name.endswith(of_codes)} for entry in _figures(folder / run)]
        for run in ("bf16-record_losses", _name("record_losses", WHOLE))
    )
    assert found == [pytest.approx(entry, rel=1e-6) for entry in expected] and len(found[0]) > 0


@pytest.mark.parametrize("stage", IN_BF16)
def test_a_step_in_bf16_shards_is_near_that_of_one_process_in_float32(folder, in_bf16_shards, stage):
    """Contrastive ended with an error: its targets are computed in float32, and its weights were bf16 without autocast."""
    tolerance = 0.1 if stage == "contrastive" else 0.01  # the noise of contrastive is each process's own
    for found, expected in zip(_losses(folder / f"bf16-{stage}"), _losses(folder / _name(stage, WHOLE)), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)


def test_stage_one_refuses_micro_batches(tmp_path, folder):
    module, argv = _run(tmp_path, "ema", ACCUMULATED)
    argv[argv.index("--cache_dir") + 1] = str(folder / "cache")
    with pytest.raises(ValueError, match="gradient_accumulation_steps 2.*stage one takes 1"):
        MAINS[module].main(argv)


def test_fsdp_where_nothing_can_be_sharded_is_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    module, argv = _run(tmp_path, "masked_waveform", WHOLE)
    argv[argv.index("--cache_dir") + 1] = str(folder / "cache")
    with pytest.raises(ValueError, match="FSDP is asked for"):
        MAINS[module].main(argv)


def test_a_run_says_how_many_processes_train(tmp_path, folder, caplog):
    module, argv = _run(tmp_path, "masked_waveform", WHOLE, "--max_steps", "1", "--eval_strategy", "no")
    argv[argv.index("--cache_dir") + 1] = str(folder / "cache")
    with caplog.at_level("INFO"):
        MAINS[module].main(argv)
    assert "one process on cpu, weights whole; a step takes 8 records = 1 x 8 x 1" in caplog.text


def test_an_epoch_takes_whole_batches_and_leaves_out_other_records_each_time():
    sampler = EpochSampler(29, seed=0, batch_size=8)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append({index for _, index in sampler})
    assert len(sampler) == 24 and all(len(taken) == 24 for taken in epochs) and epochs[0] != epochs[1]


def test_too_few_records_for_a_batch_are_an_error_that_says_what_to_lower():
    with pytest.raises(ValueError, match="7 training records make no whole batch of 8 .*per_device_train_batch_size"):
        EpochSampler(7, seed=0, batch_size=8)


def test_dead_codes_move_to_vectors_that_follow_from_the_number_of_restarts():
    def restarted(seed):
        torch.manual_seed(seed)
        options = {"update": "ema", "ema_decay": 0.9, "dead_code_share": 0.99, "dead_code_steps": 1}
        quantizer = CosineVectorQuantizer(8, 4, **options).train()
        with torch.no_grad():
            quantizer.codebook.copy_(torch.eye(8)[:, :4] + 0.1)
        vectors = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            quantizer(vectors, torch.ones(20, dtype=torch.bool))
        return quantizer.codebook.detach(), int(quantizer.num_restarts)

    (first, restarts), (second, _) = restarted(0), restarted(1)
    assert torch.equal(first, second) and restarts > 0
