"""The rhythm tokenizer as a feature extractor: what its codes are, and that its weights come along wherever it goes."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny_checkpoints import COMMIT, catch_pushes, put_into_hub_cache, tiny_model, tiny_quantizer
from transformers import AutoFeatureExtractor, AutoModel

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.simulate import simulate_record


@pytest.fixture
def extractor():
    return AnyECGRhythmFeatureExtractor(quantizer=tiny_quantizer(), clip_mv=4.0)


@pytest.fixture(scope="module")
def record():
    return simulate_record(1)


@pytest.fixture(scope="module")
def damaged():
    """A record with a gap in II from 2 to 3 s and a flat V2."""
    record = simulate_record(2, sampling_rate=250)
    record.signal[1, 500:700] = np.nan
    record.signal[7] = 0.1
    return record


@pytest.fixture
def folder(extractor, tmp_path):
    extractor.save_pretrained(tmp_path / "rhythm")
    return tmp_path / "rhythm"


# ---- codes ---------------------------------------------------------------------------------------------------------


def test_codes_are_integers_on_the_grid_of_leads_and_patches(extractor, record):
    batch = extractor(record)
    codes = batch["rhythm_codes"]
    assert codes.dtype == np.int64 and codes.shape == batch["attention_mask"].shape == (1, 12, 10)
    assert codes.min() >= 0 and codes.max() < 64 and len(np.unique(codes)) > 3


def test_codes_are_those_of_the_quantizer(extractor, record):
    batch = extractor(record, return_tensors="pt")
    codes = batch.pop("rhythm_codes")
    assert torch.equal(codes, extractor.quantizer.encode(**batch))


def test_masked_patches_have_no_code(extractor, damaged):
    batch = extractor(damaged)
    masked = batch["attention_mask"] == 0
    assert masked[0, 7].all() and masked[0, 1, 2] and not masked[0, 0].any()
    assert np.array_equal(batch["rhythm_codes"] == -100, masked)


def test_a_record_has_the_same_codes_alone_and_in_any_batch(extractor, record, damaged):
    short = simulate_record(3, duration_seconds=4, lead_names=["V5", "II"])
    records = [short, record, damaged]
    batch = extractor(records)
    assert batch["rhythm_codes"].shape == (3, 12, 10)
    for row, one in zip(batch["rhythm_codes"], records):
        alone = extractor(one)["rhythm_codes"][0]
        assert np.array_equal(row[: len(alone), : alone.shape[1]], alone)
        assert (row[len(alone) :] == -100).all() and (row[:, alone.shape[1] :] == -100).all()


def test_tensors_are_given_when_asked_for(extractor, record):
    batch = extractor(record, return_tensors="pt")
    assert batch["rhythm_codes"].dtype == torch.int64 and batch["input_values"].dtype == torch.float32


def test_windows_of_a_long_record_have_codes_and_pad_together(extractor):
    items, starts = extractor.windows(simulate_record(4, duration_seconds=14, lead_names=["II"]))
    assert starts.tolist() == [0, 4] and items[0]["rhythm_codes"].shape == (1, 10)
    short, _ = extractor.windows(simulate_record(4, duration_seconds=3, lead_names=["II", "V1"]))
    assert (extractor.pad([items[0], short[0]])["rhythm_codes"][0, 1] == -100).all()


def test_quality_is_given_beside_the_codes(extractor, damaged):
    assert set(extractor(damaged, return_quality=True)) >= {"rhythm_codes", "quality"}


def test_a_quantizer_in_training_mode_gives_settled_codes(record):
    quantizer = tiny_quantizer(hidden_dropout=0.5).train()
    extractor = AnyECGRhythmFeatureExtractor(quantizer=quantizer)
    assert np.array_equal(extractor(record)["rhythm_codes"], extractor(record)["rhythm_codes"])


def test_decode_gives_the_quantizers_waveform_and_zero_where_there_is_no_code(extractor, damaged):
    batch = extractor(damaged)
    waveform = extractor.decode(batch["rhythm_codes"], batch["lead_ids"])
    codes, lead_ids = torch.tensor(batch["rhythm_codes"]), torch.tensor(batch["lead_ids"])
    assert waveform.dtype == np.float32 and waveform.shape == batch["input_values"].shape
    assert np.array_equal(waveform, extractor.quantizer.decode(codes, lead_ids).numpy())
    assert not waveform[0, 7].any() and waveform[0, 6].any()


def test_decoding_codes_of_a_larger_codebook_is_an_error(extractor):
    with pytest.raises(ValueError, match="knows 0 to 63"):
        extractor.decode(np.full((1, 1, 2), 64), np.array([[2]]))


# ---- saving and loading --------------------------------------------------------------------------------------------


def test_the_auto_class_loads_options_and_weights_from_a_folder(extractor, folder, record):
    loaded = AutoFeatureExtractor.from_pretrained(folder)
    assert type(loaded) is AnyECGRhythmFeatureExtractor and loaded.clip_mv == 4.0
    assert np.array_equal(loaded(record)["rhythm_codes"], extractor(record)["rhythm_codes"])


def test_the_folder_is_also_the_quantizers_with_one_copy_of_the_weights(extractor, folder):
    assert [path.relative_to(folder).name for path in folder.rglob("*.safetensors")] == ["model.safetensors"]
    loaded = AutoModel.from_pretrained(folder)
    for (name, ours), (_, theirs) in zip(
        extractor.quantizer.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_saving_what_was_loaded_keeps_the_codes(extractor, folder, tmp_path, record):
    AutoFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = AutoFeatureExtractor.from_pretrained(tmp_path / "again")
    assert np.array_equal(again(record)["rhythm_codes"], extractor(record)["rhythm_codes"])


def test_a_hub_id_gives_the_weights_of_the_revision_asked_for(extractor, folder, tmp_path, record):
    other = AnyECGRhythmFeatureExtractor(quantizer=tiny_quantizer(seed=1))
    other.save_pretrained(tmp_path / "other")
    put_into_hub_cache(folder, tmp_path / "cache", "someone/rhythm")
    put_into_hub_cache(tmp_path / "other", tmp_path / "cache", "someone/rhythm", commit=COMMIT[::-1], branch="v2")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    main = AutoFeatureExtractor.from_pretrained("someone/rhythm", **where)
    second = AutoFeatureExtractor.from_pretrained("someone/rhythm", revision="v2", **where)
    assert np.array_equal(main(record)["rhythm_codes"], extractor(record)["rhythm_codes"])
    assert np.array_equal(second(record)["rhythm_codes"], other(record)["rhythm_codes"])


def test_the_token_reaches_the_download_of_the_weights(folder, monkeypatch):
    from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

    asked = {}
    load = AnyECGRhythmQuantizer.from_pretrained
    monkeypatch.setattr(AnyECGRhythmQuantizer, "from_pretrained", lambda *a, **kw: asked.update(kw) or load(*a, **kw))
    AutoFeatureExtractor.from_pretrained(folder, token="hf_x", force_download=False)
    assert asked["token"] == "hf_x"


def test_a_subfolder_holds_options_and_weights(extractor, tmp_path, record):
    extractor.save_pretrained(tmp_path / "part")
    loaded = AnyECGRhythmFeatureExtractor.from_pretrained(tmp_path, subfolder="part")
    assert np.array_equal(loaded(record)["rhythm_codes"], extractor(record)["rhythm_codes"])


def test_the_path_of_the_options_file_is_accepted(folder):
    assert AnyECGRhythmFeatureExtractor.from_pretrained(folder / "preprocessor_config.json").quantizer is not None


def test_options_can_be_changed_and_unused_ones_returned(folder):
    extractor, unused = AnyECGRhythmFeatureExtractor.from_pretrained(
        folder, clip_mv=3.0, other=1, return_unused_kwargs=True
    )
    assert extractor.clip_mv == 3.0 and unused == {"other": 1}


def test_a_quantizer_given_takes_the_place_of_the_weights(folder):
    quantizer = tiny_quantizer(seed=5)
    (folder / "model.safetensors").unlink()
    assert AnyECGRhythmFeatureExtractor.from_pretrained(folder, quantizer=quantizer).quantizer is quantizer


def test_options_without_weights_are_an_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no quantizer that can be loaded"):
        AutoFeatureExtractor.from_pretrained(folder)


def test_options_beside_another_model_are_an_error(folder):
    shutil.move(folder / "preprocessor_config.json", folder.parent)
    tiny_model(AnyECGModel).save_pretrained(folder)
    shutil.move(folder.parent / "preprocessor_config.json", folder)
    with pytest.raises(ValueError, match="does not fit AnyECGRhythmQuantizer"):
        AutoFeatureExtractor.from_pretrained(folder)


def test_saving_into_the_folder_of_another_model_is_refused_and_changes_nothing(extractor, tmp_path):
    tiny_model(AnyECGModel).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match='holds a model of type "anyecg"'):
        extractor.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_options_file_holds_no_trace_of_the_quantizer(extractor, folder):
    options = json.loads((folder / "preprocessor_config.json").read_text())
    assert not [key for key in options if "quantizer" in key]
    assert "quantizer" not in extractor.to_dict() and repr(extractor) and extractor.quantizer is not None


def test_what_is_pushed_to_the_hub_loads_with_its_weights(extractor, tmp_path, monkeypatch, record):
    catch_pushes(monkeypatch, tmp_path / "hub")
    extractor.push_to_hub("someone/rhythm")
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path / "hub" / "someone" / "rhythm")
    assert np.array_equal(loaded(record)["rhythm_codes"], extractor(record)["rhythm_codes"])


def test_saving_with_push_to_hub_pushes_the_weights_too(extractor, tmp_path, monkeypatch):
    catch_pushes(monkeypatch, tmp_path / "hub")
    extractor.save_pretrained(tmp_path / "rhythm", push_to_hub=True, repo_id="someone/rhythm")
    assert (tmp_path / "rhythm" / "model.safetensors").is_file()
    assert (tmp_path / "hub" / "someone" / "rhythm" / "model.safetensors").is_file()


# ---- without a quantizer, and with a wrong one ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda extractor, record, folder: extractor(record),
        lambda extractor, record, folder: extractor.windows(record),
        lambda extractor, record, folder: extractor.decode(np.zeros((1, 1, 1), int), np.ones((1, 1), int)),
        lambda extractor, record, folder: extractor.save_pretrained(folder),
    ],
    ids=["call", "windows", "decode", "save_pretrained"],
)
def test_without_a_quantizer_codes_are_refused(ask, record, tmp_path):
    with pytest.raises(ValueError, match="has no quantizer"):
        ask(AnyECGRhythmFeatureExtractor(), record, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_quantizer_is_refused():
    with pytest.raises(ValueError, match="AnyECGModel; accepted is an AnyECGRhythmQuantizer"):
        AnyECGRhythmFeatureExtractor(quantizer=tiny_model(AnyECGModel))


def test_a_quantizer_for_another_rate_is_refused():
    with pytest.raises(ValueError, match="sampling_rate 300, this extractor gives 250"):
        AnyECGRhythmFeatureExtractor(quantizer=tiny_quantizer(), sampling_rate=250, patch_size=250)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="clip_milivolt"):
        AnyECGRhythmFeatureExtractor(clip_milivolt=5)


def test_the_plain_extractor_gives_the_same_input(extractor, record):
    plain = AnyECGFeatureExtractor(clip_mv=4.0)(record)
    assert all(np.array_equal(plain[key], extractor(record)[key]) for key in plain)


# ---- copies and processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_copy_gives_the_same_codes(copied, extractor, record):
    assert np.array_equal(copied(extractor)(record)["rhythm_codes"], extractor(record)["rhythm_codes"])


class _Codes(torch.utils.data.Dataset):
    def __init__(self, extractor):
        self.extractor = extractor

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.extractor(simulate_record(i, lead_names=["II", "V1"]))["rhythm_codes"][0]


def test_forked_data_loader_workers_give_the_same_codes(extractor):
    loader = torch.utils.data.DataLoader(_Codes(extractor), num_workers=2, multiprocessing_context="fork")
    found = [codes[0].numpy() for codes in loader]
    assert np.array_equal(found, [_Codes(extractor)[i] for i in range(4)])
