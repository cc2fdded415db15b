"""AnyECG for Transformers: importing this package registers its models and extractors with the Auto classes, and its pipelines.

The feature extractor needs no torch; the models and pipelines are there where torch is installed.
"""

from transformers import AutoConfig, AutoFeatureExtractor
from transformers.utils import is_torch_available

from .configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig, AnyECGSparseAttentionConfig
from .feature_extraction_anyecg import AnyECGFeatureExtractor
from .feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from .hub import carry_code
from .records import Record, read_record

__version__ = "0.1.0"

AutoConfig.register("anyecg", AnyECGConfig, exist_ok=True)
AutoConfig.register("anyecg_quantizer", AnyECGQuantizerConfig, exist_ok=True)
AutoFeatureExtractor.register(AnyECGConfig, AnyECGFeatureExtractor, exist_ok=True)
AutoFeatureExtractor.register(AnyECGQuantizerConfig, AnyECGRhythmFeatureExtractor, exist_ok=True)

carry_code()

__all__ = [
    "AnyECGConfig",
    "AnyECGFeatureExtractor",
    "AnyECGQuantizerConfig",
    "AnyECGRhythmFeatureExtractor",
    "AnyECGSparseAttentionConfig",
    "Record",
    "read_record",
]

if is_torch_available():
    from transformers import (
        AutoModel,
        AutoModelForAudioFrameClassification,
        AutoModelForMaskedImageModeling,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
    )

    from .explanation import Explanation, explain
    from .modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel, AnyECGPreTrainedModel
    from .modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
    from .modeling_anyecg_long import AnyECGForLongRecords
    from .modeling_anyecg_quantizer import AnyECGRhythmQuantizer
    from .pipelines_anyecg import (
        ECGClassificationPipeline,
        ECGFeatureExtractionPipeline,
        ECGLongRecordPipeline,
        ECGReconstructionPipeline,
        register_pipelines,
    )
    from .reference_pair import verify

    AutoModel.register(AnyECGConfig, AnyECGModel, exist_ok=True)
    AutoModel.register(AnyECGQuantizerConfig, AnyECGRhythmQuantizer, exist_ok=True)
    AutoModelForPreTraining.register(AnyECGConfig, AnyECGForMaskedCodeModeling, exist_ok=True)
    AutoModelForSequenceClassification.register(AnyECGConfig, AnyECGForSequenceClassification, exist_ok=True)
    # The library's name for "reconstruct what was masked" (its output field is `reconstruction`); the input need be no image.
    AutoModelForMaskedImageModeling.register(AnyECGConfig, AnyECGForLeadReconstruction, exist_ok=True)
    # The library's name for "classify each frame of a long signal"; the frames are windows, the signal is no audio.
    AutoModelForAudioFrameClassification.register(AnyECGConfig, AnyECGForLongRecords, exist_ok=True)
    register_pipelines()

    __all__ += [
        "AnyECGForLeadReconstruction",
        "AnyECGForLongRecords",
        "AnyECGForMaskedCodeModeling",
        "AnyECGForSequenceClassification",
        "AnyECGModel",
        "AnyECGPreTrainedModel",
        "AnyECGRhythmQuantizer",
        "ECGClassificationPipeline",
        "ECGFeatureExtractionPipeline",
        "ECGLongRecordPipeline",
        "ECGReconstructionPipeline",
        "Explanation",
        "explain",
        "verify",
    ]
