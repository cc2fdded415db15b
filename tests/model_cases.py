"""Small seeded models and inputs, and a table of what differs between the five model classes; for the model tests."""

import copy
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from anyecg_hf.configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

PATCH_SIZE = 300
NUM_CODES = 16

# Weights of order one: with the usual small ones a leak of a neighbour's samples would hide below the tolerance.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_scale_init": 1.0,
    "initializer_range": 0.2,
    "max_patches": 16,
    "stem_channels": (8, 8),
    "stem_kernel_sizes": (15, 5),
    "stem_strides": (15, 1),
    "stem_norm_groups": 2,
    "stem_bins": 5,
    "codebook_size": NUM_CODES,
}
TINY_WAVEFORM = {"waveform_channels": (8, 8), "waveform_blocks": 1, "waveform_state_channels": 2}


@dataclass
class Case:
    """A model class: configuration, Auto class, main output, and how labels are made."""

    model_class: type
    auto_class: type
    main_output: str
    config_class: type = AnyECGConfig
    options: dict = field(default_factory=dict)
    takes_bool_masked_pos: bool = True
    has_grid_output: bool = True

    @property
    def name(self):
        return self.model_class.__name__


CASES = [
    Case(AnyECGModel, AutoModel, "last_hidden_state"),
    Case(AnyECGForMaskedCodeModeling, AutoModelForPreTraining, "logits"),
    Case(
        AnyECGForSequenceClassification,
        AutoModelForSequenceClassification,
        "logits",
        options={"num_labels": 3, "problem_type": "multi_label_classification", "thresholds": [0.2, 0.5, 0.8]},
        takes_bool_masked_pos=False,
        has_grid_output=False,
    ),
    Case(AnyECGForLeadReconstruction, AutoModelForMaskedImageModeling, "reconstruction", options=TINY_WAVEFORM),
    Case(
        AnyECGRhythmQuantizer,
        AutoModel,
        "reconstruction",
        config_class=AnyECGQuantizerConfig,
        options={"num_decoder_layers": 1, "codebook_dim": 8},
        takes_bool_masked_pos=False,
    ),
]
BACKBONE, MASKED_CODES, CLASSIFIER, RECONSTRUCTION, QUANTIZER = CASES
HEADS = [MASKED_CODES, CLASSIFIER, RECONSTRUCTION]


def make_config(case, **overrides):
    return case.config_class(**copy.deepcopy({**TINY, **case.options, **overrides}))


def make_model(case, seed=0, **overrides):
    """Return a model in eval mode whose biases, norms and scales are random too: nothing is neutral by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.model_class._from_config(make_config(case, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            if case is QUANTIZER:
                model.band_mean.normal_(std=0.1)
                model.band_std.uniform_(0.5, 2.0)
                spread_codes(model.eval(), make_batch(6, 3, 4, seed=99))
    return model.eval()


def spread_codes(model, batch):
    """Start the codebook of a quantizer on the vectors of `batch`, so that patches get many different codes."""
    with torch.no_grad():
        vectors, mask = model.encode_vectors(**batch)
    model.vector_quantizer.initialize(vectors[mask], generator=torch.Generator().manual_seed(0))
    return model


def make_batch(num_records=2, num_leads=3, num_patches=3, seed=0):
    """Return model inputs with every patch real: millivolt of a plausible size, leads I, II, III, ..."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_values": 0.5 * torch.randn(num_records, num_leads, num_patches * PATCH_SIZE, generator=generator),
        "lead_ids": torch.arange(1, num_leads + 1).repeat(num_records, 1),
        "attention_mask": torch.ones(num_records, num_leads, num_patches, dtype=torch.int64),
    }


def add_targets(case, batch, seed=1):
    """Return `batch` with what the class needs for a loss; every second patch hidden where the class hides patches."""
    generator = torch.Generator().manual_seed(seed)
    grid, batch = batch["attention_mask"].shape, dict(batch)
    if case in (MASKED_CODES, RECONSTRUCTION):
        batch["bool_masked_pos"] = (torch.arange(grid.numel()) % 2 == 0).view(grid)
    if case is MASKED_CODES:
        codes = torch.randint(NUM_CODES, grid, generator=generator)
        batch["labels"] = codes.masked_fill(~batch["bool_masked_pos"] | (batch["attention_mask"] == 0), -100)
    if case is CLASSIFIER:
        batch["labels"] = torch.randint(2, (grid[0], case.options["num_labels"]), generator=generator).float()
    if case is RECONSTRUCTION:
        batch["labels"] = batch["input_values"].nan_to_num()
    if case is QUANTIZER:
        batch["age"] = 20 + 60 * torch.rand(grid[0], generator=generator)
        batch["sex"] = torch.randint(2, grid[:1], generator=generator).float()
        batch["weight"] = 50 + 50 * torch.rand(grid[0], generator=generator)
    return batch


def loss_of(case, model, batch):
    """Return the model's own loss, or for the backbone a fixed random projection of its states."""
    outputs = model(**batch)
    if case is not BACKBONE:
        return outputs.loss
    weights = torch.randn(outputs.pooler_output.shape[-1], generator=torch.Generator().manual_seed(2))
    return (outputs.last_hidden_state * weights).mean() + (outputs.pooler_output * weights).mean()


@torch.no_grad()
def run(case, model, batch):
    """Return the main output of the class."""
    return getattr(model(**batch), case.main_output)


def valid_part(case, output, batch):
    """Return the elements of a grid output that belong to real patches: `(patches, ...)`; of others, all."""
    if not case.has_grid_output:
        return output
    grid = batch["attention_mask"].shape
    mask = batch["attention_mask"].bool() & (batch["lead_ids"] > 0)[..., None]
    return output.reshape(*grid, -1)[mask]


def gradients(case, model, batch):
    """Return `{name: gradient}` of the loss; parameters without one are left out."""
    model.zero_grad(set_to_none=True)
    loss_of(case, model, batch).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, n=name: f"{n}: {text}", **tolerances)


def state_of(model):
    """Return copies of all parameters and of all buffers, the non-persistent ones too."""
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def assert_same_state(found, expected):
    found, expected = (state if isinstance(state, dict) else state_of(state) for state in (found, expected))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def load_as_transformers_does(model_class, path, **kwargs):
    """Return `(model, info)` by the library's own `from_pretrained`, which fills missing weights in and goes on."""
    return PreTrainedModel.from_pretrained.__func__(model_class, path, output_loading_info=True, **kwargs)
