"""Every setting of the engine in one frozen place; each field is also a command-line flag."""

from dataclasses import dataclass

from common.device import DTYPES
from common.models.generation_config import USES
from common.options import option, validate


@dataclass(frozen=True)
class EngineConfig:
    # model
    model: str = option("smollm2-135m", "built-in name, folder, hub name or random:<preset>")
    max_model_len: int | None = option(None, "tokens a sequence may have (model's own)", minimum=2)
    seed: int | None = option(None, "makes requests that bring no seed repeat from run to run")
    generation_config: str = option("auto", "sampling defaults: the model's, or none", choices=USES)
    # device
    device: str = option("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is one")
    dtype: str = option("auto", "auto: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES)
    threads: int | None = option(None, "CPU threads (all usable cores)", minimum=1, maximum=1024)
    # memory
    kv_cache: bool = option(True, "keep each token's keys and values instead of recomputing them")

    def __post_init__(self) -> None:
        validate(self)
