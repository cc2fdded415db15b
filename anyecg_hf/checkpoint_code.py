"""What a checkpoint says about the code that loads it, for `trust_remote_code=True` where this package is not.

The library copies the file that defines a saved object, and every file that this one names in a relative import,
however deep and wherever in the text. The imports below therefore do two things: they give the names for config.json,
and they make all of the models, extractors and pipelines travel with each saved model, also when it is saved again
elsewhere.
"""

from .training_files import keep_training_files_home


def auto_map(model_type):
    """Return `{name of an Auto class: "module.Class"}` for config.json: every class that can load the `model_type`.

    Args:
        model_type (`str`): "anyecg" or "anyecg_quantizer".
    """
    from .configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig
    from .modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
    from .modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
    from .modeling_anyecg_long import AnyECGForLongRecords
    from .modeling_anyecg_quantizer import AnyECGRhythmQuantizer

    if model_type == "anyecg_quantizer":
        return _paths(AutoConfig=AnyECGQuantizerConfig, AutoModel=AnyECGRhythmQuantizer)
    return _paths(
        AutoConfig=AnyECGConfig,
        AutoModel=AnyECGModel,
        AutoModelForPreTraining=AnyECGForMaskedCodeModeling,
        AutoModelForSequenceClassification=AnyECGForSequenceClassification,
        AutoModelForMaskedImageModeling=AnyECGForLeadReconstruction,
        AutoModelForAudioFrameClassification=AnyECGForLongRecords,
    )


def extractor_class(model_type):
    """Return the class of the feature extractor that is saved beside a model of `model_type`."""
    from .feature_extraction_anyecg import AnyECGFeatureExtractor
    from .feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor

    return AnyECGRhythmFeatureExtractor if model_type == "anyecg_quantizer" else AnyECGFeatureExtractor


def pipelines_in_config():
    """Return the entry `custom_pipelines` of config.json: for each task its class, and the Auto class of its model."""
    from .pipelines_anyecg import TASKS

    return {
        task: {"impl": _path(pipeline_class), "pt": [auto_class.__name__]}
        for task, (pipeline_class, auto_class) in TASKS.items()
    }


class SavesItsCode:
    """For models: saving completes the configuration's `auto_map` and `custom_pipelines`, wherever the code goes along.

    It does for the classes of this package, also as loaded by `trust_remote_code`. A class of yours, defined
    elsewhere, is saved as the library saves it: with its own file if it is registered by `register_for_auto_class`.
    """

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights, configuration and code; arguments as for `PreTrainedModel.save_pretrained`."""
        is_ours = type(self).__module__.rpartition(".")[0] == __name__.rpartition(".")[0]
        if is_ours and self._auto_class is not None:
            self.config.auto_map = auto_map(self.config.model_type)
            if self.config.model_type == "anyecg":
                self.config.custom_pipelines = pipelines_in_config()
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            keep_training_files_home(save_directory)


class InstalledPipelines:
    """`config.custom_pipelines` where the pipelines are installed: always empty to read; what was set is saved all the
    same.

    Where this says that a checkpoint brings pipelines of its own, `transformers.pipeline` runs those, and asks for
    `trust_remote_code` before it does.
    """

    def __get__(self, config, owner=None):
        return self if config is None else {}

    def __set__(self, config, value):
        config.__dict__["custom_pipelines"] = value


def _paths(**classes):
    return {auto_class: _path(each) for auto_class, each in classes.items()}


def _path(each):
    return f"{each.__module__.split('.')[-1]}.{each.__name__}"
