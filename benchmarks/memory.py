"""What training needs of a GPU's memory, by arithmetic: weights, gradients, optimizer, teacher, activations, code logits.

    python -m benchmarks.memory [--presets base large xl] [--objective masked_codes] [--batch 64] [--gpus 1 8]

Parameters are counted on the meta device. Activations are what autograd keeps of a forward pass in bf16 autocast: counted
for one and two layers of the preset's width on a CPU, in which the rest is linear. CUDA's own autocast keeps some
normalisations in float32 and so a little more; the allocator's gaps and the libraries' work space (1 to 3 GB) come on top.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from anyecg_hf.configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.objectives import CodeBaselines, LatentPrediction, MaskedCodes, MaskedWaveform

LEADS, SECONDS = 12, 10
OBJECTIVES = ("masked_codes", "masked_waveform", "latents", "quantizer")
PRESETS = ("tiny", "small", "medium", "base", "large", "xl")
CODEBOOK_SIZES = {"tiny": 256, "small": 1024, "medium": 4096, "base": 8192, "large": 8192, "xl": 8192}
GIB = 2**30


@dataclass
class Counts:
    """Of a preset: parameters that train, frozen ones, those of a layer; bytes that autograd keeps of a record."""

    trained: int
    frozen: int
    has_teacher: bool  # which is cut into shards with the rest; a quantizer is not
    largest_layer: int
    num_layers: int
    layer_bytes: float = 0.0
    other_bytes: float = 0.0
    layer_input_bytes: int = 0

    def activations(self, *, checkpointing: bool) -> float:
        """Return bytes a record: all layers, or with checkpointing their inputs and one layer that is computed again."""
        if checkpointing:
            return self.other_bytes + self.num_layers * self.layer_input_bytes + self.layer_bytes
        return self.other_bytes + self.num_layers * self.layer_bytes


def build(objective: str, preset: str, num_layers: int | None = None) -> nn.Module:
    """Return the module that a command would train, on the current default device."""
    depth = {} if num_layers is None else {"num_hidden_layers": num_layers}
    if objective == "quantizer":
        return AnyECGRhythmQuantizer(AnyECGQuantizerConfig.from_preset(preset, **depth))
    config = AnyECGConfig.from_preset(preset, codebook_size=CODEBOOK_SIZES[preset], **depth)
    if objective == "masked_codes":
        quantizer = AnyECGRhythmQuantizer(
            AnyECGQuantizerConfig.from_preset("tiny")
        )  # not run: batches bring their codes
        return MaskedCodes(AnyECGForMaskedCodeModeling(config), quantizer, CodeBaselines(8, 16))
    if objective == "masked_waveform":
        return MaskedWaveform(AnyECGForLeadReconstruction(config))
    return LatentPrediction(AnyECGModel(config))


def count_parameters(objective: str, preset: str) -> Counts:
    with torch.device("meta"):
        module = build(objective, preset)
        quantizer = AnyECGRhythmQuantizer(AnyECGQuantizerConfig.from_preset(preset))
    frozen = sum(value.numel() for value in module.parameters() if not value.requires_grad)
    if objective == "masked_codes":
        frozen += sum(value.numel() for value in quantizer.parameters())
    layers = (module if objective == "quantizer" else module.model.base_model).encoder.layers
    return Counts(
        trained=sum(value.numel() for value in module.parameters() if value.requires_grad),
        frozen=frozen,
        has_teacher=objective == "latents",
        largest_layer=sum(value.numel() for value in layers[0].parameters()),
        num_layers=len(layers),
    )


def make_batch(batch_size: int, patch_size: int, codebook_size: int, *, device="cpu") -> dict[str, torch.Tensor]:
    """Return a batch of 12 leads x 10 s; half of the patches hidden, codes given."""
    generator = torch.Generator().manual_seed(0)
    grid = (batch_size, LEADS, SECONDS)
    batch = {
        "input_values": torch.randn(batch_size, LEADS, SECONDS * patch_size, generator=generator),
        "lead_ids": torch.arange(1, LEADS + 1).expand(batch_size, -1).contiguous(),
        "attention_mask": torch.ones(grid, dtype=torch.long),
        "bool_masked_pos": torch.rand(grid, generator=generator) < 0.5,
        "labels": torch.randint(codebook_size, grid, generator=generator),
    }
    batch["attention_mask"][0, -1, -1] = 0  # as usual something is masked
    batch["bool_masked_pos"][0, 0, 0] = True
    return {name: value.to(device) for name, value in batch.items()}


def kept_bytes(module: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Return how many bytes autograd keeps of a forward pass in bf16 autocast, besides the parameters themselves."""
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(**batch)  # held: its graph keeps what is counted
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


def bytes_a_record(objective: str, preset: str, num_layers: int) -> int:
    """Return what one more record of a batch adds (what does not grow with it are casts of the weights)."""
    module = build(objective, preset, num_layers).train()
    config = module.config if objective == "quantizer" else module.model.config
    one, two = (kept_bytes(module, make_batch(size, config.patch_size, config.codebook_size)) for size in (1, 2))
    return two - one


def count(objective: str, preset: str) -> Counts:
    """Return the counts of a preset at its full depth."""
    counts = count_parameters(objective, preset)
    first, second = (bytes_a_record(objective, preset, num_layers) for num_layers in (1, 2))
    counts.layer_bytes, counts.other_bytes = second - first, 2 * first - second
    config = (AnyECGQuantizerConfig if objective == "quantizer" else AnyECGConfig).from_preset(preset)
    counts.layer_input_bytes = 4 * LEADS * SECONDS * config.hidden_size  # the residual stream is float32
    return counts


def gibibytes(counts: Counts, *, batch_size: int, num_gpus: int, in_shards: bool, checkpointing: bool) -> dict:
    """Return what each part takes of one GPU: fp32 weights, gradients and AdamW; bf16 copies of what is computed with."""
    share = num_gpus if in_shards else 1
    copies = (
        2 * counts.largest_layer * 2 if in_shards else 2 * counts.trained
    )  # this layer and the next, or all of them
    parts = {
        "weights": 4 * counts.trained / share,
        "gradients": 4 * counts.trained / share,
        "AdamW": 8 * counts.trained / share,
        "frozen": 4 * counts.frozen / (share if counts.has_teacher else 1),
        "bf16": copies,
        "activations": batch_size * counts.activations(checkpointing=checkpointing),
    }
    parts = {name: value / GIB for name, value in parts.items()}
    return parts | {"sum": sum(parts.values())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--objective", default="masked_codes", choices=OBJECTIVES)
    parser.add_argument("--batch", type=int, default=64, help="records a GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="above 1: in shards (FSDP2)")
    args = parser.parse_args(argv)
    names = ("weights", "gradients", "AdamW", "frozen", "bf16", "activations", "sum")
    print(f"GiB a GPU, {args.objective}, {args.batch} records a GPU of {LEADS} leads x {SECONDS} s")
    print("| preset | M parameters | GPUs | checkpointing | " + " | ".join(names) + " | code logits |")
    print("|---" * (len(names) + 5) + "|")
    for preset in args.presets:
        counts = count(args.objective, preset)
        # bf16 logits, their float32 copy, its log softmax and gradient; part of the activations
        logits = args.batch * LEADS * SECONDS * CODEBOOK_SIZES[preset] * (2 + 4 + 4 + 4) / GIB
        for num_gpus in args.gpus:
            for checkpointing in (False, True):
                parts = gibibytes(counts, batch_size=args.batch, num_gpus=num_gpus, in_shards=num_gpus > 1,
                                  checkpointing=checkpointing)  # fmt: skip
                row = [preset, f"{counts.trained / 1e6:.1f}", str(num_gpus), "yes" if checkpointing else "no"]
                row += [f"{parts[name]:.2f}" for name in names]
                row.append(f"{logits:.2f}" if args.objective == "masked_codes" else "-")
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
