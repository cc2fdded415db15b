"""What the backbone is pretrained on; one objective a file.

| name | file | ends as |
|---|---|---|
| masked_codes (the paper) | `masked_codes.py` | `AnyECGForMaskedCodeModeling`; with `--code_weight 0` `AnyECGModel` |
| masked_waveform | `masked_waveform.py` | `AnyECGForLeadReconstruction` |
| contrastive (ECG-FM) | `contrastive.py` | `AnyECGModel` |
| latents (JEPA) | `latents.py` | `AnyECGModel` |

Masked codes can go with losses of the whole record: age and sex (`demography.py`), its median beat and rhythm (`beats.py`).
"""

from .base import Objective, RecordHead
from .beats import BeatHead, beat_statistics
from .contrastive import Contrastive
from .demography import DemographyHead
from .latents import LatentPrediction
from .masked_codes import CodeBaselines, MaskedCodes
from .masked_waveform import MaskedWaveform

__all__ = [
    "BeatHead", "CodeBaselines", "Contrastive", "DemographyHead", "LatentPrediction", "MaskedCodes", "MaskedWaveform",
    "Objective", "RecordHead", "beat_statistics",
]  # fmt: skip
