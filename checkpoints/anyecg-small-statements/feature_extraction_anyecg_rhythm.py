"""AnyECGRhythmFeatureExtractor: the model's input and the rhythm codes of a record, by a quantizer that it carries.

A folder of it is a folder of the quantizer - config.json, model.safetensors - with preprocessor_config.json beside:
one copy of the weights, `AutoModel` gives the quantizer and `AutoFeatureExtractor` this class.
"""

import copy
import json
from pathlib import Path

import numpy as np
from transformers.feature_extraction_utils import BatchFeature

from .feature_extraction_anyecg import AnyECGFeatureExtractor

try:
    import torch
except ImportError:  # options can be read without torch; codes cannot be made
    torch = None

_QUANTIZER_TYPE = "anyecg_quantizer"  # compared by name: code loaded from a folder has classes of its own
_NOT_PREDICTED = -100
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class AnyECGRhythmFeatureExtractor(AnyECGFeatureExtractor):
    """`AnyECGFeatureExtractor` that also gives `rhythm_codes`: the rhythm tokenizer of the paper, stage 1.

    Args:
        quantizer (`AnyECGRhythmQuantizer`, *optional*): makes the codes; put into evaluation mode. Without one the
            options can be read and changed, but asking for codes raises. It may be set later, as an attribute.
        options: those of `AnyECGFeatureExtractor`; `sampling_rate` and `patch_size` must be the quantizer's.

    Codes are made on the quantizer's device. In DataLoader workers leave it on the CPU, where it is unless you move it.

    Raises:
        ValueError: the quantizer is of another kind, rate or patch size. TypeError: an option is unknown.

    Example:
        >>> extractor = AutoFeatureExtractor.from_pretrained("checkpoints/anyecg-small-rhythm")  # doctest: +SKIP
        >>> extractor(read_record("A0001"))["rhythm_codes"].shape  # doctest: +SKIP
        (1, 12, 10)
    """

    model_input_names = [*AnyECGFeatureExtractor.model_input_names, "rhythm_codes"]

    def __init__(self, quantizer=None, **options):
        super().__init__(**options)
        self.quantizer = quantizer

    @property
    def quantizer(self):
        """The `AnyECGRhythmQuantizer` that makes the codes, or None."""
        return self._quantizer

    @quantizer.setter
    def quantizer(self, quantizer):
        if quantizer is not None:
            self._refuse_unfit(quantizer)
            quantizer.eval()  # dropout would make the codes random
        self._quantizer = quantizer

    def __call__(self, record, *, return_tensors=None, **kwargs):
        """Return the model's input for one record or several, and the codes of its patches.

        Args: as for `AnyECGFeatureExtractor`.

        Returns:
            `BatchFeature`: as `AnyECGFeatureExtractor`, and `rhythm_codes` int64 `(batch, leads, patches)`: 0 to
            `codebook_size - 1`, -100 where `attention_mask` is 0. A record's codes do not depend on its batch.

        Raises:
            ValueError: there is no quantizer; and as `AnyECGFeatureExtractor`.
        """
        self._require_quantizer()
        batch = super().__call__(record, **kwargs)
        inputs = zip(batch["input_values"], batch["lead_ids"], batch["attention_mask"], strict=True)
        batch["rhythm_codes"] = np.stack([self._codes(*one) for one in inputs])
        return BatchFeature(dict(batch), tensor_type=return_tensors)

    def windows(self, record, **kwargs):
        """Return a long record cut into windows, as `AnyECGFeatureExtractor.windows`, each with `rhythm_codes`."""
        self._require_quantizer()
        items, start_seconds = super().windows(record, **kwargs)
        for item in items:
            item["rhythm_codes"] = self._codes(item["input_values"], item["lead_ids"], item["attention_mask"])
        return items, start_seconds

    def decode(self, rhythm_codes, lead_ids, attention_mask=None):
        """Return the waveform `(batch, leads, samples)` that codes stand for: float32, mV, 0 where there is no code.

        Args:
            rhythm_codes, attention_mask (arrays or tensors `(batch, leads, patches)`): as this extractor gives them.
            lead_ids (array or tensor `(batch, leads)`): likewise.

        Raises:
            ValueError: there is no quantizer, or a code is none of its.
        """
        device = self._require_quantizer().device
        given = (rhythm_codes, lead_ids, attention_mask)
        tensors = [None if one is None else torch.as_tensor(one, device=device) for one in given]
        return self.quantizer.decode(*tensors).float().cpu().numpy()

    def _codes(self, input_values, lead_ids, attention_mask):
        """Return the codes `(leads, patches)` of one record.

        Encoded alone and without what is masked at its edges, so that rounding cannot make a code depend on the batch.
        """
        leads = np.flatnonzero(attention_mask.any(axis=1))
        num_patches = int(np.flatnonzero(attention_mask.any(axis=0))[-1]) + 1
        quantizer = self.quantizer
        with torch.no_grad():
            found = quantizer.encode(
                self._tensor(input_values[leads, : num_patches * self.patch_size]).to(quantizer.dtype),
                self._tensor(lead_ids[leads]),
                self._tensor(attention_mask[leads, :num_patches]),
            )
        codes = np.full(attention_mask.shape, _NOT_PREDICTED, np.int64)
        codes[leads, :num_patches] = found[0].cpu().numpy()
        return codes

    def _tensor(self, array):
        # copied: where an array happens to begin in memory must not decide between two codes that are equally near
        return torch.tensor(array, device=self.quantizer.device)[None]

    def _require_quantizer(self):
        if self._quantizer is None:
            raise ValueError(
                f"This {type(self).__name__} has no quantizer, so it cannot make rhythm codes. Load one with its "
                "weights by AutoFeatureExtractor.from_pretrained(folder or Hub id), or set extractor.quantizer = "
                "AnyECGRhythmQuantizer.from_pretrained(...). For input without codes take AnyECGFeatureExtractor."
            )
        return self._quantizer

    def _refuse_unfit(self, quantizer):
        config = getattr(quantizer, "config", None)
        if getattr(config, "model_type", None) != _QUANTIZER_TYPE:
            raise ValueError(f"quantizer is a {type(quantizer).__name__}; accepted is an AnyECGRhythmQuantizer.")
        for name in ("sampling_rate", "patch_size"):
            needed, own = getattr(config, name), getattr(self, name)
            if own != needed:
                raise ValueError(
                    f"The quantizer was trained with {name} {needed}, this extractor gives {own}; "
                    f"pass {name}={needed} to the extractor."
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, quantizer=None, return_unused_kwargs=False, **kwargs):
        """Load options and quantizer from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder, Hub id, or path of a
                preprocessor_config.json.
            quantizer (`AnyECGRhythmQuantizer`, *optional*): taken instead of the weights beside the options.
            return_unused_kwargs (`bool`): return `(extractor, kwargs that no option took)`.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, and options to
                change.

        Raises:
            OSError: options or weights are not there. ValueError: the weights do not fit a quantizer.
        """
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        subfolder = kwargs.get("subfolder") or ""
        extractor, unused = super().from_pretrained(pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs)
        if quantizer is None:
            quantizer = _load_quantizer(pretrained_model_name_or_path, subfolder=subfolder, **hub_options)
        extractor.quantizer = quantizer
        return (extractor, unused) if return_unused_kwargs else extractor

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Write options (preprocessor_config.json) and quantizer (config.json, model.safetensors) to a folder.

        Args:
            save_directory (`str` or `os.PathLike`): made if absent; must not hold a model of another kind.
            push_to_hub (`bool`): also push; `kwargs` are then those of `push_to_hub`, `repo_id` by default the
                folder's name.

        Returns:
            `list[str]`: the preprocessor_config.json written.

        Raises:
            ValueError: there is no quantizer, or the folder holds another model.
        """
        self._require_quantizer()
        _refuse_foreign_folder(Path(save_directory))
        sharding = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
        self.quantizer.save_pretrained(save_directory, **sharding)
        files = super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def to_dict(self):
        """Return the options; the quantizer is no option."""
        without = copy.copy(self)
        del without.__dict__["_quantizer"]
        return super(AnyECGRhythmFeatureExtractor, without).to_dict()


def _load_quantizer(source, **hub_options):
    try:
        from .modeling_anyecg_quantizer import AnyECGRhythmQuantizer
    except ImportError as error:
        raise ImportError(f"Rhythm codes need PyTorch ({error}). Install it with: pip install torch") from error
    if Path(source).is_file():
        source = Path(source).parent
    try:
        return AnyECGRhythmQuantizer.from_pretrained(source, dtype=torch.float32, **hub_options)
    except OSError as error:
        raise OSError(
            f'"{source}" has the options of a rhythm feature extractor but no quantizer that can be loaded: '
            "config.json and model.safetensors must lie beside preprocessor_config.json, as save_pretrained writes "
            f"them. ({error})"
        ) from error


def _refuse_foreign_folder(folder):
    config = folder / "config.json"
    if not config.is_file():
        return
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if model_type != _QUANTIZER_TYPE:
        raise ValueError(
            f'{folder} holds a model of type "{model_type}", which the config.json and weights of the quantizer would '
            "replace. Save the rhythm feature extractor to a folder of its own."
        )
