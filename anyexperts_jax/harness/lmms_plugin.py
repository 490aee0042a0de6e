"""The entry point by which lmms-eval finds our model: `lmms-eval --model anyexperts --model_args pretrained=PATH`.

lmms-eval loads it in every process that imports its models, so nothing of this package is imported before a model is.
"""

from typing import Any

MODEL_ID = "anyexperts"


def manifest() -> Any:
    """Returns lmms-eval's `ModelManifest` of the model classes in `harness.lmms`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "anyexperts_jax.harness.lmms"
    return ModelManifest(
        MODEL_ID, simple_class_path=f"{module}.SimpleHarnessLMM", chat_class_path=f"{module}.HarnessLMM"
    )
