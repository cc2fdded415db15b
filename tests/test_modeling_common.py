"""What every model class must do to be a native citizen of Transformers.

Own code; the choice of checks follows the library's common model tests. "Same" is bit-equal if no tolerance is given.
"""

import copy
import dataclasses
import inspect
import json
import pickle
import warnings

import pytest
import torch
from model_cases import (
    BACKBONE,
    CASES,
    CLASSIFIER,
    HEADS,
    MASKED_CODES,
    NUM_CODES,
    PATCH_SIZE,
    QUANTIZER,
    RECONSTRUCTION,
    add_targets,
    assert_same_gradients,
    assert_same_state,
    gradients,
    load_as_transformers_does,
    loss_of,
    make_batch,
    make_config,
    make_model,
    run,
    state_of,
    valid_part,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import ModelOutput

import anyecg_hf  # noqa: F401  (registers the classes with the Auto classes)
from anyecg_hf.modeling_anyecg import AnyECGLayer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32: same numbers, other order of summation

every_class = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_head = pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa", "cardio_sparse"])
every_backbone = pytest.mark.parametrize("case", [BACKBONE, *HEADS], ids=lambda case: case.name)


def edit_weights(folder, edit):
    """Apply `edit` to the dictionary of tensors in a checkpoint's safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a model and gives the folder."""

    def save(model, name="checkpoint"):
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


# Saving and loading


@every_class
def test_a_loaded_model_has_the_same_parameters_and_buffers(case, saved):
    model = make_model(case)
    assert_same_state(case.model_class.from_pretrained(saved(model)), model)


@every_class
def test_the_auto_class_loads_the_same_model(case, saved):
    model = make_model(case)
    loaded = case.auto_class.from_pretrained(saved(model))
    assert type(loaded) is case.model_class
    assert_same_state(loaded, model)


@every_class
def test_a_loaded_model_gives_the_same_output_and_is_in_eval_mode(case, saved):
    model, batch = make_model(case), make_batch()
    loaded = case.auto_class.from_pretrained(saved(model))
    assert not loaded.training
    assert torch.equal(run(case, loaded, batch), run(case, model, batch))


@every_class
def test_saving_a_loaded_model_again_writes_the_same_tensors_and_configuration(case, saved):
    first = saved(make_model(case), "first")
    second = saved(case.auto_class.from_pretrained(first), "second")
    assert saved_config(first) == saved_config(second)
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert_same_state(after, before)


def saved_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["sparse_attention_config"].pop("dtype", None)  # the library fills it in when it loads
    return config


@every_class
def test_weights_are_saved_as_safetensors_only(case, saved):
    files = {path.name for path in saved(make_model(case)).iterdir() if path.suffix != ".py"}  # beside the code
    assert files == {"config.json", "model.safetensors", ".gitignore"}


@every_class
def test_every_parameter_and_buffer_is_in_the_file(case, saved):
    model = make_model(case)
    assert load_file(saved(model) / "model.safetensors").keys() == state_of(model).keys()


@every_class
def test_no_two_tensors_share_their_memory(case):
    pointers = [tensor.data_ptr() for tensor in make_model(case).state_dict().values() if tensor.numel()]
    assert len(pointers) == len(set(pointers))


@every_class
def test_the_configuration_names_the_class_of_the_checkpoint(case, saved):
    assert AutoConfig.from_pretrained(saved(make_model(case))).architectures == [case.name]


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_the_backbone_is_taken_out_of_a_checkpoint_with_a_head(case, saved):
    model = make_model(case)
    assert_same_state(AutoModel.from_pretrained(saved(model)), model.anyecg)


@every_head
def test_a_new_head_is_put_on_a_backbone_when_asked_for(case, saved):
    backbone = make_model(BACKBONE)
    loaded = case.auto_class.from_pretrained(saved(backbone), new_head=True)
    assert_same_state(loaded.anyecg, backbone)
    assert all(value.isfinite().all() for value in loaded.parameters())


@pytest.mark.parametrize("source", [MASKED_CODES, RECONSTRUCTION], ids=lambda case: case.name)
def test_a_new_head_takes_the_place_of_another_head_when_asked_for(source, saved):
    pretrained = make_model(source)
    loaded = CLASSIFIER.model_class.from_pretrained(saved(pretrained), new_head=True)
    assert_same_state(loaded.anyecg, pretrained.anyecg)


@every_head
def test_a_head_that_nobody_asked_for_is_an_error(case, saved):
    with pytest.raises(ValueError, match="new_head=True"):
        case.auto_class.from_pretrained(saved(make_model(BACKBONE)))


@pytest.mark.parametrize("source", HEADS, ids=lambda case: case.name)
@pytest.mark.parametrize("target", HEADS, ids=lambda case: case.name)
def test_a_checkpoint_with_another_head_is_an_error(source, target, saved):
    if source is target:
        return
    with pytest.raises(ValueError, match="does not fit"):
        target.model_class.from_pretrained(saved(make_model(source)))


@pytest.mark.parametrize("target", [BACKBONE, *HEADS], ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{}, {"new_head": True}], ids=["as it is", "new head"])
def test_a_quantizer_checkpoint_does_not_become_another_model(target, options, saved):
    with pytest.raises(ValueError, match="does not fit"):
        target.model_class.from_pretrained(saved(make_model(QUANTIZER)), **options)


@pytest.mark.parametrize("source", [BACKBONE, *HEADS], ids=lambda case: case.name)
def test_no_other_checkpoint_becomes_a_quantizer(source, saved):
    with pytest.raises(ValueError, match="does not fit"):
        QUANTIZER.model_class.from_pretrained(saved(make_model(source)), new_head=True)


@every_class
def test_a_missing_tensor_is_an_error_that_names_it(case, saved):
    folder = saved(make_model(case))
    names = sorted(load_file(folder / "model.safetensors"))
    for name in (names[0], names[len(names) // 2], names[-1]):
        edit_weights(folder, lambda tensors, n=name: tensors.pop(n))
        with pytest.raises(ValueError, match="missing weights"):
            case.auto_class.from_pretrained(folder)
        saved(make_model(case))


def test_a_missing_buffer_of_the_quantizer_is_an_error(saved):
    folder = saved(make_model(QUANTIZER))
    edit_weights(folder, lambda tensors: tensors.pop("vector_quantizer.code_share"))
    with pytest.raises(ValueError, match="vector_quantizer.code_share"):
        AutoModel.from_pretrained(folder)


@every_class
def test_a_tensor_too_many_is_an_error_that_names_it(case, saved):
    folder = saved(make_model(case))
    edit_weights(folder, lambda tensors: tensors.update({"stranger.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="stranger.weight"):
        case.auto_class.from_pretrained(folder)


@every_class
def test_a_tensor_of_another_shape_is_an_error(case, saved):
    folder = saved(make_model(case))
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith("mask_token"))
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        case.auto_class.from_pretrained(folder)


@every_head
def test_only_the_head_may_change_its_size(case, saved):
    folder = saved(make_model(case))
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith("mask_token"))
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    with pytest.raises(ValueError, match="mask_token"):
        case.model_class.from_pretrained(folder, ignore_mismatched_sizes=True)


@every_class
def test_loading_information_is_given_on_request(case, saved):
    model, info = case.model_class.from_pretrained(saved(make_model(case)), output_loading_info=True)
    assert isinstance(model, case.model_class)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@every_class
def test_a_model_is_pickled_and_copied_whole(case):
    model, batch = make_model(case), make_batch()
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same_state(twin, model)
        assert torch.equal(run(case, twin, batch), run(case, model, batch))


# Initialisation


@every_class
def test_init_weights_fills_every_parameter_and_buffer_from_meta(case):
    with torch.device("meta"):
        model = case.model_class(make_config(case))
    model.to_empty(device="cpu")
    fill_with_garbage(model)
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    assert_looks_initialised(model, case.model_class(make_config(case)))


@every_class
def test_loading_an_empty_checkpoint_initialises_everything(case):
    model, _ = load_as_transformers_does(case.model_class, None, config=make_config(case), state_dict={})
    torch.manual_seed(0)
    assert_looks_initialised(model, case.model_class(make_config(case)))


def fill_with_garbage(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)


def assert_looks_initialised(model, expected):
    """Every tensor is like that of a model built the plain way: the same constants, or about the same spread."""
    found, expected = state_of(model), state_of(expected)
    assert found.keys() == expected.keys()
    for name, plain in expected.items():
        value = found[name]
        assert value.dtype == plain.dtype and value.shape == plain.shape, name
        if plain.numel() < 2 or plain.float().std() == 0:
            assert torch.equal(value, plain), name
        else:
            assert value.isfinite().all() and 0.5 < value.std() / plain.std() < 2, name


@every_class
def test_initialisation_is_reproducible_and_depends_on_the_seed(case):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(state_of(case.model_class(make_config(case))))
    assert_same_state(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@every_class
def test_filling_in_a_missing_tensor_leaves_the_loaded_ones_alone(case, saved):
    model = make_model(case)
    folder, saved_state = saved(model), state_of(model)
    for name in one_tensor_a_module_class(model):
        edit_weights(folder, lambda tensors, n=name: tensors.pop(n))
        loaded = state_of(load_as_transformers_does(case.model_class, folder)[0])
        edit_weights(folder, lambda tensors, n=name: tensors.update({n: saved_state[n]}))
        assert [other for other in loaded if other != name and not torch.equal(loaded[other], saved_state[other])] == []


def one_tensor_a_module_class(model):
    """Return the name of the last tensor that the first module of each class owns directly."""
    names = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if own:
            names.setdefault(type(module), f"{path}.{own[-1][0]}".lstrip("."))
    return names.values()


# Precision


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_checkpoint_loads_in_half_precision_and_counters_stay_whole_numbers(case, dtype, saved):
    model = make_model(case)
    loaded = case.auto_class.from_pretrained(saved(model), dtype=dtype)
    assert loaded.dtype == dtype
    for name, plain in state_of(model).items():
        kept = not plain.is_floating_point() or name in (
            "vector_quantizer.codebook",
            "vector_quantizer.code_share",
        )
        assert state_of(loaded)[name].dtype == (plain.dtype if kept else dtype), name


@every_backbone
@every_attention
def test_half_precision_gives_about_the_same_output(case, attention, saved):
    """bfloat16 keeps 8 bits; the weights here are of order one: errors of a few per cent of the spread are its due."""
    folder, batch = saved(make_model(case)), make_batch()
    plain = case.auto_class.from_pretrained(folder, attn_implementation=attention)
    half = case.auto_class.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
    expected, found = run(case, plain, batch), run(case, half, batch)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean().sqrt() < 0.1 * expected.std()


@every_class
@every_attention
def test_autocast_trains(case, attention):
    model, batch = make_model(case, attn_implementation=attention).train(), add_targets(case, make_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(case, model, batch)
    loss.backward()
    assert loss.dtype == torch.float32 or case is BACKBONE
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


# Outputs


@every_class
def test_the_tuple_holds_the_fields_of_the_output_in_their_order(case):
    model = make_model(case, attn_implementation="eager")
    batch = {**add_targets(case, make_batch()), "output_hidden_states": True, "output_attentions": True}
    outputs, parts = model(**batch), model(**batch, return_dict=False)
    assert isinstance(parts, tuple)
    fields = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    fields = [value for value in fields if value is not None]
    assert len(parts) == len(fields)
    assert [type(part) for part in parts] == [type(value) for value in fields]
    torch.testing.assert_close(parts, tuple(fields), atol=0, rtol=0, equal_nan=True)


@every_class
def test_outputs_are_dataclasses_of_tensors_in_grid_shape(case):
    batch = make_batch(2, 3, 4)
    outputs = make_model(case)(**batch)
    assert isinstance(outputs, ModelOutput) and dataclasses.is_dataclass(outputs)
    shapes = {
        "last_hidden_state": (2, 3, 4, 32),
        "logits": (2, 3, 4, NUM_CODES) if case is MASKED_CODES else (2, 3),
        "reconstruction": (2, 3, 4 * PATCH_SIZE),
    }
    assert outputs[case.main_output].shape == shapes[case.main_output]


@every_backbone
def test_hidden_states_are_embeddings_and_layers_in_grid_shape(case):
    model, batch = make_model(case), make_batch(2, 3, 4)
    hidden_states = model(**batch, output_hidden_states=True).hidden_states
    assert [state.shape for state in hidden_states] == [(2, 3, 4, 32)] * 3
    last = getattr(model, "anyecg", model)(**batch).last_hidden_state
    torch.testing.assert_close(hidden_states[-1], last, atol=0, rtol=0)


@every_backbone
@pytest.mark.parametrize("num_global_tokens", [0, 2])
def test_attentions_are_square_and_their_rows_sum_to_one(case, num_global_tokens):
    sparse = {"num_global_tokens": num_global_tokens}
    model = make_model(case, attn_implementation="eager", sparse_attention_config=sparse)
    attentions = model(**make_batch(2, 3, 4), output_attentions=True).attentions
    size = 12 + num_global_tokens
    assert [weights.shape for weights in attentions] == [(2, 2, size, size)] * 2
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, size), **TOLERANCE)


@every_backbone
def test_hidden_states_and_attentions_come_only_when_asked_for(case):
    outputs = make_model(case, attn_implementation="eager")(**make_batch())
    assert outputs.hidden_states is None and outputs.attentions is None


@every_backbone
def test_attentions_of_an_implementation_that_keeps_none_are_an_error(case):
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        make_model(case, attn_implementation="sdpa")(**make_batch(), output_attentions=True)


@every_backbone
def test_the_attention_implementation_can_be_changed_later(case):
    model, batch = make_model(case, attn_implementation="sdpa"), make_batch()
    before = run(case, model, batch)
    model.set_attn_implementation("eager")
    assert model(**batch, output_attentions=True).attentions[0].shape == (2, 2, 9, 9)
    torch.testing.assert_close(run(case, model, batch), before, **TOLERANCE)


@every_class
def test_cardio_sparse_is_the_default_and_stays_so_when_saved_and_loaded(case, tmp_path):
    model = make_model(case)
    assert model.config._attn_implementation == "cardio_sparse"
    model.save_pretrained(tmp_path)
    assert case.model_class.from_pretrained(tmp_path).config._attn_implementation == "cardio_sparse"
    explicit = case.model_class.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert explicit.config._attn_implementation == "sdpa"


@every_class
def test_arguments_of_forward_are_spelt_out(case):
    names = [name for name in inspect.signature(case.model_class.forward).parameters if name != "self"]
    assert names[:3] == ["input_values", "lead_ids", "attention_mask"]
    assert ("labels" in names) == (case in HEADS)
    assert ("bool_masked_pos" in names) == case.takes_bool_masked_pos


@pytest.mark.parametrize("case", [*HEADS, QUANTIZER], ids=lambda case: case.name)
def test_the_first_output_in_training_is_the_loss(case):
    outputs = make_model(case)(**add_targets(case, make_batch()))
    assert next(iter(outputs)) == "loss" and outputs.loss.shape == ()


# Equal numbers by other ways


@every_class
@pytest.mark.parametrize("num_global_tokens", [0, 2])
def test_eager_and_sdpa_give_the_same_output_and_gradients(case, num_global_tokens):
    batch = add_targets(case, uneven_batch())
    outputs, found = {}, {}
    for attention in ("eager", "sdpa"):
        sparse = {"num_global_tokens": num_global_tokens, "time_tolerance": 1}
        model = make_model(case, attn_implementation=attention, sparse_attention_config=sparse)
        outputs[attention], found[attention] = run(case, model, batch), gradients(case, model, batch)
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], **TOLERANCE)
    assert_same_gradients(found["sdpa"], found["eager"], atol=1e-5, rtol=1e-3)


def uneven_batch():
    """Two records: one whole, one with a masked patch and its last two patches padded."""
    batch = make_batch(2, 3, 4)
    batch["attention_mask"][1, 1, 0] = 0
    batch["attention_mask"][1, :, 2:] = 0
    return batch


@every_class
def test_the_same_input_gives_the_same_output(case):
    model, batch = make_model(case, hidden_dropout=0.3, attention_dropout=0.3), make_batch()
    assert torch.equal(run(case, model, batch), run(case, model, batch))


@every_class
def test_dropout_acts_in_training_only(case):
    model, batch = make_model(case, hidden_dropout=0.3), make_batch()
    plain = run(case, model, batch)
    assert not torch.equal(run(case, model.train(), batch), plain)


@every_class
def test_the_input_is_left_as_it_was(case):
    model, batch = make_model(case).train(), add_targets(case, uneven_batch())
    before = {name: value.clone() for name, value in batch.items()}
    loss_of(case, model, batch).backward()
    assert all(torch.equal(batch[name], before[name]) for name in batch)


@every_class
@every_attention
def test_a_record_alone_gives_the_same_as_in_a_batch(case, attention):
    model, batch = make_model(case, attn_implementation=attention), uneven_batch()
    together = run(case, model, batch)
    for i in range(2):
        alone = run(case, model, {name: value[i : i + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[i], **TOLERANCE)


@every_class
def test_inputs_that_are_not_contiguous_give_the_same(case):
    model, batch = make_model(case), add_targets(case, make_batch())
    strided = dict(batch)
    for name in batch.keys() & {"input_values", "attention_mask", "bool_masked_pos"}:
        strided[name] = batch[name].transpose(1, 2).contiguous().transpose(1, 2)
    if case in (MASKED_CODES, RECONSTRUCTION):
        strided["labels"] = batch["labels"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided["input_values"].is_contiguous()
    torch.testing.assert_close(loss_of(case, model, strided), loss_of(case, model, batch), **TOLERANCE)
    torch.testing.assert_close(run(case, model, strided), run(case, model, batch), **TOLERANCE)


@every_class
def test_a_boolean_mask_means_the_same_as_zeros_and_ones(case):
    model, batch = make_model(case), uneven_batch()
    as_bool = {**batch, "attention_mask": batch["attention_mask"].bool()}
    assert torch.equal(run(case, model, as_bool), run(case, model, batch))


@every_class
def test_no_mask_means_that_every_patch_is_real(case):
    model, batch = make_model(case), make_batch()
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    torch.testing.assert_close(run(case, model, without), run(case, model, batch), **TOLERANCE)


@every_class
@every_attention
def test_a_fully_masked_record_gives_finite_numbers_and_gradients(case, attention):
    model, batch = make_model(case, attn_implementation=attention), add_targets(case, make_batch())
    batch["attention_mask"][0] = 0
    assert run(case, model, batch).isfinite().all()
    assert all(value.isfinite().all() for value in gradients(case, model, batch).values())


@every_class
def test_garbage_in_masked_patches_changes_neither_output_nor_gradients(case):
    model, batch = make_model(case), add_targets(case, uneven_batch())
    spoilt = {**batch, "input_values": spoil(batch, batch["attention_mask"] == 0)}
    assert torch.equal(run(case, model, spoilt), run(case, model, batch))
    assert_same_gradients(gradients(case, model, spoilt), gradients(case, model, batch), atol=0, rtol=0)


def spoil(batch, where):
    """Return the waveforms with NaN, infinity and huge values in the patches `where` (B, L, P) is True."""
    patches = batch["input_values"].clone().view(*where.shape, PATCH_SIZE)
    patches[where] = torch.tensor([float("nan"), float("inf"), 1e30]).repeat(PATCH_SIZE // 3)
    return patches.flatten(2)


@every_class
def test_no_gradient_reaches_the_samples_of_masked_patches(case):
    model, batch = make_model(case), add_targets(case, uneven_batch())
    batch["input_values"] = spoil(batch, batch["attention_mask"] == 0).requires_grad_()
    if case is BACKBONE:
        batch["bool_masked_pos"] = None
    loss_of(case, model, batch).backward()
    gradient = batch["input_values"].grad.view(2, 3, 4, PATCH_SIZE)
    assert (gradient[batch["attention_mask"] == 0] == 0).all()
    assert gradient.isfinite().all() and (gradient != 0).any()


@every_class
def test_nan_in_one_record_does_not_reach_another(case):
    model, batch = make_model(case), make_batch()
    expected = run(case, model, batch)[1]
    batch["input_values"][0, 0, 5] = float("nan")
    assert torch.equal(run(case, model, batch)[1], expected)


# Training


@every_class
def test_every_trainable_parameter_gets_a_gradient(case):
    """Only the mask token of a class that hides nothing may go without: it keeps checkpoints in one form."""
    model, batch = make_model(case), add_targets(case, make_batch())
    if case.takes_bool_masked_pos:
        batch.setdefault("bool_masked_pos", torch.arange(18).view(2, 3, 3) % 2 == 0)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    unused = trainable - gradients(case, model, batch).keys()
    assert unused == {name for name in unused if name.endswith("mask_token") and not case.takes_bool_masked_pos}


@every_class
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old name of the method, the only one up to 5.22
def test_gradient_checkpointing_gives_the_same_gradients(case):
    """The quantizer in the state after the step too: its moving averages must not run again in the recomputation."""
    batch, found, states, calls = add_targets(case, uneven_batch()), [], [], []
    for checkpointing in (False, True):
        model = make_model(case).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        layers = [module for module in model.modules() if isinstance(module, AnyECGLayer)]
        seen = count_calls(layers)
        torch.manual_seed(3)
        found.append(gradients(case, model, batch))
        states.append(state_of(model))
        calls.append(sum(seen))
    assert calls[1] == 2 * calls[0]  # each layer ran again in the backward pass, so checkpointing was on
    assert_same_gradients(found[1], found[0], atol=0, rtol=0)
    assert_same_state(states[1], states[0])


def count_calls(modules):
    """Return a list that gets a 1 for each run of the attention in one of `modules`."""
    seen = []
    for module in modules:
        module.attention.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@every_class
def test_the_trainer_divides_the_loss_by_the_accumulation_steps(case):
    counts_itself = hasattr(case.model_class, "count_items")  # for training.trainer, over all micro-batches
    assert case.model_class.accepts_loss_kwargs is counts_itself


@pytest.mark.parametrize("case", [*HEADS, QUANTIZER], ids=lambda case: case.name)
def test_gradient_accumulation_equals_the_whole_batch(case, tmp_path):
    """Both see the same four records; every record counts alike, since each has as many real and hidden patches."""
    batch = add_targets(case, make_batch(4, 3, 4))
    whole = one_trainer_step(case, batch, tmp_path / "whole", records=4, accumulation=1)
    parts = one_trainer_step(case, batch, tmp_path / "parts", records=1, accumulation=4)
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-4)
    assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-3)


def one_trainer_step(case, batch, folder, *, records, accumulation):
    """Return the log of one step of `Trainer` over the records of `batch`."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    options = {"codebook_update": "gradient"} if case is QUANTIZER else {}  # moving averages go on with each part
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["input_values"]))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=records,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=1e9,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(make_model(case, **options), arguments, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("case", [*HEADS, QUANTIZER], ids=lambda case: case.name)
def test_the_trainer_reports_an_evaluation_loss(case, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    batch = add_targets(case, make_batch(2))
    rows = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        prediction_loss_only=True,
        dataloader_pin_memory=False,
    )
    model = make_model(case)
    metrics = Trainer(model, arguments, eval_dataset=rows).evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_of(case, model, batch).item(), rel=1e-4)


@every_head
def test_a_head_learns_a_handful_of_records(case):
    model = make_model(case, initializer_range=0.02, layer_scale_init=0.1).train()
    batch = add_targets(case, make_batch(2, 2, 2))
    batch["input_values"] = smooth(batch["input_values"])
    if case is RECONSTRUCTION:
        batch["labels"] = batch["input_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = loss_of(case, model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def smooth(signal):
    return nn.functional.avg_pool1d(signal, 31, stride=1, padding=15) * 5


# Compiling and exporting


# Compiling costs seconds: each head and the quantizer is either compiled or exported, the backbone in them both.
@pytest.mark.parametrize(
    "case, any_size", [(MASKED_CODES, True), (QUANTIZER, False)], ids=["masked codes", "quantizer"]
)
def test_the_compiled_model_gives_the_same(case, any_size):
    model = make_model(case, num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=any_size)
    for sizes in ((2, 3, 4), (3, 2, 5))[: 1 + any_size]:  # a size of 1 would be compiled for itself
        batch = make_batch(*sizes)
        batch["attention_mask"][-1, -1, -1] = 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = run(case, compiled, batch)
        torch.testing.assert_close(found, run(case, model, batch), **TOLERANCE)


@pytest.mark.parametrize("case", [CLASSIFIER, RECONSTRUCTION], ids=lambda case: case.name)
def test_the_exported_model_takes_any_number_of_records_leads_and_patches(case):
    model = make_model(case, num_hidden_layers=1)
    program = torch.export.export(model, (), kwargs=make_batch(2, 3, 4), dynamic_shapes=dynamic_shapes(), strict=False)
    exported = program.module()
    for sizes in ((2, 3, 4), (1, 2, 5), (4, 12, 10)):
        batch = make_batch(*sizes)
        batch["attention_mask"][-1, -1, -1] = 0
        found = getattr(exported(**batch), case.main_output)
        torch.testing.assert_close(found, run(case, model, batch), **TOLERANCE)


def dynamic_shapes():
    records, leads = torch.export.Dim("records", min=1, max=64), torch.export.Dim("leads", min=1, max=15)
    patches = torch.export.Dim("patches", min=2, max=16)
    return {
        "input_values": {0: records, 1: leads, 2: PATCH_SIZE * patches},
        "lead_ids": {0: records, 1: leads},
        "attention_mask": {0: records, 1: leads, 2: patches},
    }


def test_a_compiled_model_is_saved_under_the_plain_names(saved):
    model = make_model(BACKBONE)
    folder = saved(torch.compile(model, backend="eager"))
    assert_same_state(AutoModel.from_pretrained(folder), model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@every_class
@every_attention
def test_the_accelerator_gives_the_same(case, attention):
    model, batch = make_model(case, attn_implementation=attention), uneven_batch()
    expected = run(case, model, batch)
    found = run(case, model.to("cuda"), {name: value.to("cuda") for name, value in batch.items()})
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


# Wrong input


@every_class
@pytest.mark.parametrize(
    "change",
    [
        {"input_values": torch.zeros(3, 900)},
        {"input_values": torch.zeros(2, 3, 899)},
        {"input_values": torch.zeros(2, 3, 0)},
        {"lead_ids": torch.ones(2, 2, dtype=torch.int64)},
        {"lead_ids": torch.ones(3, dtype=torch.int64)},
        {"attention_mask": torch.ones(2, 3, 900)},
        {"attention_mask": torch.ones(2, 1, 3)},
        {"attention_mask": torch.ones(2, 3)},
    ],
    ids=lambda change: f"{next(iter(change))} {tuple(next(iter(change.values())).shape)}",
)
def test_shapes_that_do_not_fit_are_an_error_that_gives_them(case, change):
    given = tuple(next(iter(change.values())).shape)
    with pytest.raises(ValueError, match=str(given).replace("(", r"\(").replace(")", r"\)")):
        make_model(case)(**{**make_batch(2, 3, 3), **change})


@every_class
def test_a_record_longer_than_the_model_is_an_error_that_says_the_remedy(case):
    with pytest.raises(ValueError, match="17 patches.*at most 16.*windows"):
        make_model(case)(**make_batch(1, 1, 17))


@pytest.mark.parametrize("case", [BACKBONE, MASKED_CODES, RECONSTRUCTION], ids=lambda case: case.name)
def test_a_mask_of_hidden_patches_must_have_the_shape_of_the_grid(case):
    with pytest.raises(ValueError, match="bool_masked_pos"):
        make_model(case)(**make_batch(), bool_masked_pos=torch.ones(2, 1, 3, dtype=torch.bool))


@every_class
def test_the_longest_record_that_the_model_takes_runs(case):
    assert run(case, make_model(case), make_batch(1, 2, 16)).isfinite().all()


# Invariances of the grid: also see test_invariances.py for real records


@every_class
@every_attention
def test_patches_appended_as_padding_change_nothing(case, attention):
    model, batch = make_model(case, attn_implementation=attention), make_batch(2, 3, 3)
    padded = {
        "input_values": torch.cat([batch["input_values"], torch.full((2, 3, 2 * PATCH_SIZE), 7.0)], dim=2),
        "lead_ids": batch["lead_ids"],
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(2, 3, 2, dtype=torch.int64)], dim=2),
    }
    assert_same_valid_output(case, model, padded, batch)


@every_class
@pytest.mark.parametrize("way", ["masked", "lead_id 0", "both"])
def test_an_absent_lead_may_be_left_out_masked_or_have_lead_id_0(case, way):
    model, batch = make_model(case), make_batch(2, 4, 3)
    kept = [0, 1, 3]
    absent = {name: value.clone() for name, value in batch.items()}
    if way != "lead_id 0":
        absent["attention_mask"][:, 2] = 0
    if way != "masked":
        absent["lead_ids"][:, 2] = 0
    assert_same_valid_output(case, model, absent, {name: value[:, kept] for name, value in batch.items()})


@every_class
def test_a_row_with_lead_id_0_is_absent_also_where_no_mask_is_given(case):
    model, batch = make_model(case), make_batch(2, 3, 3)
    padded = {
        "input_values": torch.cat([batch["input_values"], torch.zeros(2, 1, 3 * PATCH_SIZE)], dim=1),
        "lead_ids": torch.cat([batch["lead_ids"], torch.zeros(2, 1, dtype=torch.int64)], dim=1),
    }
    found = run(case, model, padded)
    found = found[:, :3] if case.has_grid_output else found
    torch.testing.assert_close(found, run(case, model, batch), **TOLERANCE)


def assert_same_valid_output(case, model, first, second):
    found = valid_part(case, run(case, model, first), first)
    torch.testing.assert_close(found, valid_part(case, run(case, model, second), second), **TOLERANCE)


@every_class
@every_attention
def test_leads_may_come_in_any_order_with_their_ids(case, attention):
    model, batch = make_model(case, attn_implementation=attention), uneven_batch()
    order = [2, 0, 1]
    permuted = run(case, model, {name: value[:, order] for name, value in batch.items()})
    expected = run(case, model, batch)
    expected = expected[:, order] if case.has_grid_output else expected
    torch.testing.assert_close(permuted, expected, **TOLERANCE)


@every_class
@pytest.mark.parametrize("change", ["polarity", "swapped leads", "swapped times", "size"])
def test_another_signal_gives_another_result(case, change):
    model, batch = make_model(case), make_batch()
    signal = batch["input_values"]
    other = {
        "polarity": -signal,
        "swapped leads": signal[:, [1, 0, 2]],
        "swapped times": signal.roll(PATCH_SIZE, -1),
        "size": 2 * signal,
    }[change]
    found, expected = run(case, model, {**batch, "input_values": other}), run(case, model, batch)
    if case.has_grid_output and change == "swapped leads":
        found = found[:, [1, 0, 2]]
    if case.has_grid_output and change == "swapped times":
        found = found.roll(-expected.shape[2] // 3, 2)
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", [BACKBONE, RECONSTRUCTION, QUANTIZER], ids=lambda case: case.name)
def test_states_and_waveforms_are_zero_in_masked_patches(case):
    batch = uneven_batch()
    output = run(case, make_model(case), batch).reshape(2, 3, 4, -1)
    assert (output[batch["attention_mask"] == 0] == 0).all()
    assert (output[batch["attention_mask"] == 1] != 0).any(-1).all()
