"""The health page of a tokenizer: its figures against independent computations, its folder, its words."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_checkpoints import tiny_quantizer

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from tokenization import report
from tokenization.report_figures import (
    CodedRecords,
    add_noise,
    code_and_decode,
    codebook_section,
    delay,
    lead_copy_section,
    reconstruction_section,
    stability_section,
    top_codes,
    traces_of,
)
from tokenization.report_probes import Targets, associated_codes, bag_features, probe_section
from tokenization.train import save_tokenizer
from training.collate import ECGCollator
from training.data import DataArguments, load_splits

NUM_RECORDS, CODEBOOK_SIZE = 135, 32
LOG = [
    {"step": 2, "epoch": 0.1, "loss": 2.0, "grad_norm": 1.0},
    {"step": 4, "epoch": 0.2, "loss": 1.0, "grad_norm": float("nan")},
    {"step": 4, "epoch": 0.2, "eval_loss": 1.5, "eval_fve": 0.25},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_quantizer(codebook_size=CODEBOOK_SIZE)
    rate = {"sampling_rate": model.config.sampling_rate, "patch_size": model.config.patch_size}
    save_tokenizer(model, AnyECGFeatureExtractor(**rate), folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step, log in ((2, LOG[:1]), (4, LOG)):
        (folder / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "log_history": log}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def _write(checkpoint, cache, folder, *options):
    where = ["--checkpoint", str(checkpoint), "--cache_dir", str(cache), "--out", str(folder)]
    report.main([*where, "--num_proc", "1", *options])
    return folder


@pytest.fixture(scope="module")
def page(checkpoint, run_dir, cache, tmp_path_factory):
    options = ["--simulate", str(NUM_RECORDS), "--num_codes", "2", "--run", str(run_dir)]
    with pytest.MonkeyPatch.context() as patch:  # fewer of what takes long
        patch.setattr(report.probes, "NUM_RESAMPLES", 10)
        patch.setattr(report.probes, "CODES_EACH_SIGN", 1)
        patch.setattr(report, "CODES_A_PICTURE", 1)
        patch.setattr("training.pictures.DPI", 40)
        return _write(checkpoint, cache, tmp_path_factory.mktemp("page"), *options)


@pytest.fixture(scope="module")
def figures(page):
    return json.loads((page / "report.json").read_text())


@pytest.fixture(scope="module")
def by_hand(checkpoint, cache):
    """Codes (R, L, P), originals and decoded waveforms (R, L, T) of the held-out records, one record at a time."""
    model, collator = tiny_quantizer(codebook_size=CODEBOOK_SIZE), ECGCollator(report.load_extractor(checkpoint))
    _, held_out = load_splits(DataArguments(simulate=NUM_RECORDS, cache_dir=str(cache)), collator.extractor, seed=0)
    held_out = report.sample_of(held_out, len(held_out))  # the same order
    codes, originals, decoded = [], [], []
    for index in range(len(held_out)):
        batch = collator([held_out[index]])
        codes.append(model.encode(batch["input_values"], batch["lead_ids"], batch["attention_mask"]))
        decoded.append(model.decode(codes[-1], batch["lead_ids"]))
        originals.append(batch["input_values"])
        assert batch["attention_mask"].all(), "the simulated records are usable throughout"
    return tuple(torch.cat(parts).numpy() for parts in (codes, originals, decoded))


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_outside_its_folder(page):
    text = (page / "index.html").read_text()
    links = _Links()
    links.feed(text)
    assert sorted(set(links.found)) == sorted({path.name for path in page.iterdir()} - {"index.html"})
    assert not {"script", "link", "iframe"} & set(links.tags) and "url(" not in text and "@import" not in text


def test_every_picture_is_a_png_whose_caption_says_from_how_much_it_is(page, figures):
    text = (page / "index.html").read_text()
    assert {each["section"] for each in figures["pictures"]} >= {
        "codebook", "codes", "reconstruction", "association_age", "association_sex", "association_AFIB", "lead_copy",
        "training", "stability",
    }  # fmt: skip
    for each in figures["pictures"]:
        assert (page / each["file"]).read_bytes().startswith(b"\x89PNG")
        number = "4 steps" if each["section"] == "training" else f"{NUM_RECORDS // 9} held-out records"
        assert number in each["caption"] and text.count(f'src="{each["file"]}"') == 1


def test_the_page_says_what_was_measured_and_how(page, figures, checkpoint):
    text = (page / "index.html").read_text()
    assert figures["command"].startswith(f"python -m tokenization.report --checkpoint {checkpoint}")
    assert figures["command"] in text and f"{NUM_RECORDS} simulated records" in text and "fold 9" in text
    assert "FAIL" in text  # random weights explain nothing


def test_usage_and_perplexity_are_those_of_the_codes(figures, by_hand):
    numbers, counts = np.unique(by_hand[0], return_counts=True)
    own = figures["codebook"]["quantizer"]
    assert own["usage"] == len(numbers) / CODEBOOK_SIZE and own["dead_codes"] == CODEBOOK_SIZE - len(numbers)
    assert own["perplexity"] == pytest.approx(np.exp(entropy(counts)))
    assert own["perplexity_share"] == pytest.approx(np.exp(entropy(counts)) / CODEBOOK_SIZE)
    assert own["biggest_code"] == counts.max() / counts.sum()
    assert own["biggest_code_number"] == numbers[counts.argmax()]
    assert len(figures["codebook"]["shares"]["quantizer"]) == CODEBOOK_SIZE


def test_the_most_used_codes_come_with_their_median_waveform(figures, by_hand):
    codes, originals, decoded = by_hand
    first = figures["top_codes"][0]
    assert first["count"] == (codes == first["code"]).sum() == np.unique(codes, return_counts=True)[1].max()
    shown, leads = first["waveforms"][0], list(first["count_by_lead"])
    lead = list(AnyECGFeatureExtractor().lead_names).index(shown["lead"])
    chosen = codes[:, lead] == first["code"]  # (R, P)
    patches, from_codes = (each[:, lead].reshape(*chosen.shape, -1)[chosen] for each in (originals, decoded))
    np.testing.assert_allclose(shown["median"], np.median(patches, axis=0), atol=1e-4)
    np.testing.assert_allclose(shown["low"], np.quantile(patches, 0.1, axis=0), atol=1e-4)
    np.testing.assert_allclose(shown["decoded_in_records"], np.median(from_codes, axis=0), atol=1e-3)
    assert shown["count"] == chosen.sum() == max(first["count_by_lead"][name] for name in leads)


def test_r_and_rmse_of_each_lead_are_those_of_numpy(figures, by_hand):
    _, originals, decoded = by_hand
    rows = {row["lead"]: row for row in figures["reconstruction"]["by_lead"]}
    assert list(rows) == [*AnyECGFeatureExtractor().lead_names, "all"]
    for lead, name in ((1, "II"), (6, "V1")):
        pairs = list(zip(originals[:, lead], decoded[:, lead]))
        each_r = [np.corrcoef(pair)[0, 1] for pair in pairs]
        assert rows[name]["median_r"] == pytest.approx(np.median(each_r), abs=1e-5)
        assert rows[name]["low_r"] == pytest.approx(np.quantile(each_r, 0.1), abs=1e-5)
        rmse = [np.sqrt(np.mean((x - y) ** 2)) for x, y in pairs]
        assert rows[name]["median_rmse_mv"] == pytest.approx(np.median(rmse), rel=1e-4)
    pooled = np.corrcoef(originals.ravel(), decoded.ravel())[0, 1]
    assert rows["all"]["pooled_r"] == pytest.approx(pooled, abs=1e-5)
    error = np.square(originals.astype(float) - decoded).sum()
    fve = 1 - error / np.square(originals - originals.mean(dtype=float)).sum()
    assert rows["all"]["pooled_fve"] == pytest.approx(fve, rel=1e-4)
    assert rows["all"]["pooled_fve"] == pytest.approx(figures["codebook"]["quantizer"]["fve"], rel=1e-4)


def test_the_records_drawn_are_chosen_by_their_rank(figures, by_hand):
    _, originals, decoded = by_hand
    errors = np.square(originals.astype(float) - decoded).sum((1, 2))
    spread = np.square(originals - originals.mean((1, 2), dtype=float, keepdims=True)).sum((1, 2))
    order = np.argsort(1 - errors / spread)
    shown = {each["rule"]: each["index"] for each in figures["reconstruction"]["examples"]}
    last = len(order) - 1
    expected = {"best decile": 0.9, "median": 0.5, "worst decile": 0.1}
    assert shown == {name: order[round(share * last)] for name, share in expected.items()}


def test_the_lead_copy_matrix_is_a_plain_count(figures, by_hand):
    codes = by_hand[0]
    same, chance = np.zeros((12, 12)), np.zeros((12, 12))
    for i in range(12):
        for j in range(12):
            same[i, j] = np.mean([a == b for a, b in zip(codes[:, i].ravel(), codes[:, j].ravel())])
            chance[i, j] = np.mean([[a == b for a in codes[:, i].ravel()] for b in codes[:, j].ravel()])
    np.testing.assert_allclose(figures["lead_copy"]["same_code"], same)
    np.testing.assert_allclose(figures["lead_copy"]["by_chance"], chance)
    off = same[~np.eye(12, dtype=bool)]
    assert figures["lead_copy"]["mean_same_code"] == pytest.approx(off.mean())


def test_the_curves_hold_everything_the_newest_checkpoint_logged(figures, page):
    training = figures["training"]
    assert training["checkpoint"] == "checkpoint-4" and training["steps"] == 4
    assert training["series"]["loss"] == {"steps": [2, 4], "values": [2.0, 1.0]}
    assert training["series"]["grad_norm"]["values"] == [1.0, None]
    assert training["once"] == {"eval_loss": 1.5, "eval_fve": 0.25}
    assert "eval_fve 0.25" in (page / "index.html").read_text()


def test_a_run_without_a_checkpoint_is_named_before_anything_is_measured(checkpoint, cache, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint-N"):
        _write(checkpoint, cache, tmp_path / "page", "--simulate", "9", "--run", str(tmp_path))
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def small_page(checkpoint, cache, tmp_path_factory):
    return _write(checkpoint, cache, tmp_path_factory.mktemp("small"), "--simulate", "9", "--num_codes", "1")


def test_few_records_give_a_page_that_says_what_is_not_known(small_page):
    text = (small_page / "index.html").read_text()
    assert "are not known of enough records" in text and "No training run was given" in text
    assert json.loads((small_page / "report.json").read_text())["probes"] == []


def test_the_same_records_give_the_same_bytes(checkpoint, cache, small_page, tmp_path):
    again = _write(checkpoint, cache, tmp_path, "--simulate", "9", "--num_codes", "1")
    assert {path.name for path in again.iterdir()} == {path.name for path in small_page.iterdir()}
    for path in again.iterdir():  # the command names the folder
        before = (small_page / path.name).read_bytes().replace(str(small_page).encode(), str(tmp_path).encode())
        assert path.read_bytes() == before, path.name


def _coded(codes, patches=None, decoded=None):
    """Return `CodedRecords` of a grid of codes (R, L, P) and its patches (R, L, P, S), without where the code is -100."""
    records, leads, places = np.nonzero(codes >= 0)
    chosen = records, leads, places
    patches = np.zeros((*codes.shape, 2), np.float32) if patches is None else patches
    decoded = patches if decoded is None else decoded
    return CodedRecords(codes[chosen], records, leads + 1, places, patches[chosen], decoded[chosen], len(codes))


def test_patches_that_are_not_usable_count_nowhere(checkpoint):
    model = tiny_quantizer(codebook_size=CODEBOOK_SIZE)
    size = model.config.patch_size
    generator = np.random.default_rng(0)
    values = generator.normal(0, 0.5, (3, 12, 4 * size)).astype(np.float32)
    mask = generator.random((3, 12, 4)) < 0.6
    batch = {
        "input_values": torch.from_numpy(values), "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "lead_ids": torch.arange(1, 13).expand(3, 12),
    }  # fmt: skip
    coded = code_and_decode(model, [batch], lambda items: items[0])
    assert len(coded.codes) == mask.sum() and coded.num_records == 3
    np.testing.assert_array_equal(coded.patches, values.reshape(3, 12, 4, size)[mask])
    original, _ = traces_of(coded, 1)["V1"]
    usable = np.repeat(mask[1, 6], size)[: len(original)]
    np.testing.assert_array_equal(np.isfinite(original), usable)
    np.testing.assert_array_equal(original[usable], values[1, 6][: len(original)][usable])


def test_records_without_a_usable_patch_are_refused_with_a_reason():
    model = tiny_quantizer(codebook_size=CODEBOOK_SIZE)
    shape = (1, 2, 3 * model.config.patch_size)
    batch = {"input_values": torch.zeros(shape), "attention_mask": torch.zeros(1, 2, 3, dtype=torch.int64)}
    batch["lead_ids"] = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="None of the 1 held-out records has a usable patch"):
        code_and_decode(model, [batch], lambda items: items[0])


def test_leads_that_are_never_usable_together_have_no_share():
    codes = np.array([[[3, 4, -100], [3, 5, -100], [-100, -100, 1]]])
    section = lead_copy_section(_coded(codes), 8)
    assert section["same_code"][0][1] == 0.5 and np.isnan(section["same_code"][0][2])
    assert section["best_neighbour"] == {"I": {"lead": "II", "share": 0.5}, "II": {"lead": "I", "share": 0.5}}


def test_the_most_used_codes_are_sorted_and_dead_ones_left_out():
    assert top_codes(_coded(np.array([[[5, 5, 2]], [[5, 2, 7]]])), 9, 5) == [5, 2, 7]


def test_a_flat_trace_has_no_r_and_does_not_spoil_the_median():
    patches = np.random.default_rng(0).normal(size=(2, 1, 1, 50)).astype(np.float32)
    patches[1] = 0
    section = reconstruction_section(_coded(np.zeros((2, 1, 1), int), patches, patches + 0.5), ["a", "b"])
    row = section["by_lead"][0]
    assert row["median_r"] == pytest.approx(1) and row["median_rmse_mv"] == pytest.approx(0.5)
    assert {each["record_id"] for each in section["examples"]} == {"a"}


@pytest.mark.parametrize(
    "figures, failing",
    [
        ({}, set()),
        ({"usage": 0.5}, {"usage"}),
        ({"perplexity": 30}, {"perplexity_share"}),
        ({"fve": 0.64}, {"fve", "fve_above_kmeans"}),
        ({"fve": 0.65}, {"fve_above_kmeans"}),
        ({"fve_low_range": float("nan")}, {"fve_low_range"}),
    ],
)
def test_a_figure_below_its_floor_fails(figures, failing):
    good = {"usage": 0.9, "perplexity": 50, "fve": 0.8, "fve_low_range": 0.4}
    shares = {name: np.full(100, 0.01) for name in ("quantizer", "kmeans")}
    section = codebook_section({"quantizer": good | figures, "kmeans": good | {"fve": 0.7}}, shares)
    assert {check["name"] for check in section["checks"] if not check["passes"]} == failing
    assert len(section["checks"]) == 5


def _planted_bags(generator, num_records):
    """Return bags of 4 codes, ages that follow from the first one, sexes from the second, and no rhythm."""
    bags = generator.multinomial(60, (0.3, 0.3, 0.2, 0.2), size=num_records)
    features = bag_features(bags)
    ages = 20 + 100 * features[:, :1]
    return bags, ages, (features[:, 1:2] > np.median(features[:, 1])).astype(float)


def test_the_probe_finds_what_is_planted_and_nothing_else(monkeypatch):
    monkeypatch.setattr(report.probes, "NUM_RESAMPLES", 50)
    generator = np.random.default_rng(0)
    (train, train_ages, train_sexes), (held_out, ages, sexes) = (_planted_bags(generator, n) for n in (400, 200))
    noise = [generator.integers(0, 2, (n, 1)).astype(float) for n in (400, 200)]
    ages[:20] = np.nan  # unknown
    targets = {"age": Targets(["age"], train_ages, ages), "sex": Targets(["female"], train_sexes, sexes)}
    targets["rhythm"] = Targets(["AFIB"], *noise)
    patients = [f"patient {index // 2}" for index in range(200)]
    rows = probe_section({"quantizer": train}, {"quantizer": held_out}, targets, patients)
    age, sex, rhythm = rows
    assert age["quantizer"]["r2"] > 0.99 and age["num_held_out"] == 180
    constant_error = np.abs(ages[20:] - train_ages.mean()).mean()
    assert age["constant"]["mae"] == pytest.approx(constant_error) and abs(age["constant"]["r2"]) < 0.05
    assert sex["quantizer"]["auroc"] > 0.95 and sex["positives"] == sexes.sum()
    assert abs(rhythm["quantizer"]["auroc"] - 0.5) < 0.12
    low, high = rhythm["interval"]
    assert low < rhythm["quantizer"]["auroc"] < high


def test_the_probe_of_the_page_is_beside_that_of_kmeans(figures):
    rows = {row["name"]: row for row in figures["probes"]}
    assert {"age", "female", "AFIB"} <= set(rows)
    for row in rows.values():
        assert set(row["quantizer"]) == set(row["kmeans"]) == set(row["constant"])
        assert row["num_held_out"] == 15 and row["num_train"] == 120
    assert rows["AFIB"]["positives"] == 5  # every third record


def test_associated_codes_are_those_with_the_largest_correlation():
    generator = np.random.default_rng(0)
    (train, train_ages, _), (held_out, ages, _) = (_planted_bags(generator, n) for n in (400, 200))
    found = associated_codes(train, held_out, Targets(["age"], train_ages, ages), "age", num_each=1)
    expected = [np.corrcoef(bag_features(train)[:, code], train_ages[:, 0])[0, 1] for code in range(4)]
    assert [each["code"] for each in found] == [int(np.argmax(expected)), int(np.argmin(expected))]
    assert [each["r_train"] for each in found] == pytest.approx([max(expected), min(expected)])
    first = bag_features(held_out)[:, found[0]["code"]]
    assert found[0]["r_held_out"] == pytest.approx(np.corrcoef(first, ages[:, 0])[0, 1])


def test_noise_is_as_far_below_the_usable_signal_as_stated():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 8000, generator=generator) * torch.tensor([0.1, 1.0, 3.0])[:, None] + 2.0
    mask = torch.ones(2, 3, 8, dtype=torch.int64)
    mask[..., 4:] = 0
    values[..., 4000:] = 50.0  # not usable: must not count as power
    noise = (add_noise(values, mask, 12.0, torch.Generator().manual_seed(1)) - values).numpy()
    ratio = values[..., :4000].numpy().var(axis=-1) / noise.var(axis=-1)
    np.testing.assert_allclose(10 * np.log10(ratio), 12.0, atol=0.3)


def test_a_delay_moves_the_signal_and_repeats_its_first_value():
    delayed = delay(torch.arange(6.0).view(1, 1, 6), 2)
    assert delayed.flatten().tolist() == [0, 0, 0, 1, 2, 3]


def test_stability_counts_codes_that_stay_where_the_neighbour_before_is_usable():
    values = torch.tensor([[[1.0, 1.0, 10.5, 10.5, 3.0, 3.0, 4.0, 4.0]]])
    batch = {"input_values": values, "attention_mask": torch.tensor([[[1, 1, 0, 1]]]), "lead_ids": torch.ones(1, 1)}

    def first_sample(altered):
        return altered["input_values"][..., ::2].int().numpy()

    collator = type("Collator", (), {"extractor": type("E", (), {"sampling_rate": 20}), "__call__": lambda s, x: x[0]})
    rows = {row["alteration"]: row for row in stability_section({"own": first_sample}, [batch], collator())}
    assert rows["gain 0.9"]["num_patches"] == 1  # the second patch alone
    assert rows["gain 0.9"]["own"] == 0.0 and rows["gain 1.1"]["own"] == 0.0  # 9.45, 11.55
    assert rows["10 ms later"]["own"] == 1.0 and rows["50 ms later"]["own"] == 0.0  # no sample, one sample


def test_the_page_names_every_alteration(figures):
    assert [row["alteration"] for row in figures["stability"]] == [
        "white noise, 12 dB", "gain 0.9", "gain 1.1", "10 ms later", "20 ms later", "50 ms later"
    ]  # fmt: skip
    assert all(0 <= row[name] <= 1 for row in figures["stability"] for name in ("quantizer", "kmeans"))
