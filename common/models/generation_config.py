"""Sampling defaults that a checkpoint brings, as `generation_config.json` says them.

A model's makers know at which temperature it works; a request that says nothing of a field gets
theirs, as in vLLM (which does not look at `do_sample` either). What the file says of fields that are
not supported here is named in a log line.
"""

import logging
from pathlib import Path
from typing import Any

from common.models.checkpoint import read_json
from common.models.errors import ModelError
from common.sampling import SamplingParams

FIELDS = ("temperature", "top_p", "top_k", "min_p")
FILE = "generation_config.json"
USES = ("auto", "none")  # of the file: as defaults, or not at all
NEUTRAL = {"repetition_penalty": 1.0}  # of sampling fields that are not supported

logger = logging.getLogger(__name__)


def sampling_defaults(folder: Path, use: str = "auto") -> dict[str, Any]:
    """SamplingParams fields and values that a model's folder asks for; empty with use="none".

    Raises ModelError for a value that SamplingParams would not take.
    """
    if use == "none" or not (folder / FILE).exists():
        return {}
    values = read_json(folder / FILE)
    defaults = {name: values[name] for name in FIELDS if values.get(name) is not None}
    try:
        params = SamplingParams(**defaults)
    except ValueError as error:
        raise ModelError(f"{folder / FILE}: {error}") from None
    defaults = {name: getattr(params, name) for name in defaults}
    if defaults:
        listed = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
        logger.warning("Sampling defaults of %s: %s (--generation-config none: not)", FILE, listed)
    for name, neutral in NEUTRAL.items():
        if values.get(name) not in (None, neutral):
            logger.warning("%s asks for %s %s, which is not supported", FILE, name, values[name])
    return defaults
