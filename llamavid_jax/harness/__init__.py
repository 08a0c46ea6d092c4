"""The model in other evaluation harnesses: lmms-eval and VLMEvalKit (docs/evaluation.md)."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval finds through this package's entry point; the class is imported when the model is selected."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llamavid_jax", chat_class_path=f"{__name__}.lmms_eval.LlamaVidJax")
