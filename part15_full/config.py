"""Every setting of the engine in one frozen place; each field is also a command-line flag."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from common.device import DTYPES, resolve_device
from common.http.tools.formats import PARSERS
from common.kernels import select_ops
from common.kv_transfer.options import ASKING, ROLES, TELLING, TRANSPORTS
from common.models.generation_config import USES
from common.options import option, validate

from .compatibility import check_composition
from .presets import PRESETS
from .quantization import FORMATS

ENGINE_CORES = ("auto", "thread", "process")
PROCESS = ("engine_core", ("auto", "process"))
EP = ("enable_expert_parallel", (True,))
FORMATS_OR_OFF = ("off", *FORMATS)
ACTIVATIONS, KV_FORMATS = ("off", "int8", "fp8"), ("auto", "int8", "fp8")
BACKENDS = ("allgather_reducescatter", "all_to_all")
PREFIX_CACHES = ("hash", "radix", "off")
OFFLOADS = ("off", "swap", "prefix", "both")
OFFLOADING, KEEPING = ("offload", OFFLOADS[1:]), ("offload", ("prefix", "both"))
SLICES = ("enable_chunked_prefill", (True,))
SLEEP_REQUESTS = ("wait", "refuse")
PROPOSERS = ("off", "ngram", "draft", "self")
DRAFTING, NGRAM = ("speculative", PROPOSERS[1:]), ("speculative", ("ngram",))
APART, PREFILL, DECODE = (("role", roles) for roles in (ROLES[1:], TELLING, ASKING))
DRAFT, SELF = ("speculative", ("draft",)), ("speculative", ("self",))


@dataclass(frozen=True)
class EngineConfig:
    presets: ClassVar = PRESETS

    # model
    model: str = option("smollm2-135m", "built-in name, folder, hub name or random:<preset>")
    max_model_len: int | None = option(None, "tokens a sequence may have (model's own)", 2)
    seed: int | None = option(None, "makes requests that bring no seed repeat from run to run")
    generation_config: str = option("auto", "sampling defaults: the model's, or none", choices=USES)
    # device
    device: str = option("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is one")
    dtype: str = option("auto", "auto: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES)
    kernels: str = option("auto", "auto, reference, cpu, triton or flash")
    threads: int | None = option(None, "CPU threads (all usable cores)", 1, 1024)
    # processes
    engine_core: str = option(
        "auto",
        "where a server's engine runs: in a thread of the HTTP process, or in a process of its own;"
        " auto: a thread, with several HTTP processes a process",
        choices=ENGINE_CORES,
    )
    api_server_count: int = option(
        1, "HTTP processes in front of one engine core", 1, 256, needs=PROCESS
    )
    # quantization
    quantization: str = option(
        "off", "format that linear layers' weights are rounded to", choices=FORMATS_OR_OFF
    )
    activations: str = option(
        "off",
        "what their inputs are rounded to, token by token and group by group",
        choices=ACTIVATIONS,
    )
    quantize_embeddings: str = option(
        "auto",
        "format of embedding and head; auto: int8-g32 where quantization is set",
        choices=("auto", *FORMATS_OR_OFF),
    )
    kv_cache_dtype: str = option(
        "auto", "format of keys and values; auto: dtype's", choices=KV_FORMATS
    )
    # ranks
    tensor_parallel_size: int = option(
        1,
        "ranks that share the model: processes, each with a GPU or some of the cores",
        1,
        1024,
        aliases=("--tp",),
    )
    pipeline_parallel_size: int = option(
        1, "stages of layers, each of tensor_parallel_size ranks", 1, 1024, aliases=("--pp",)
    )
    rank_timeout: float = option(
        30.0, "seconds within which a rank that has died or hangs is noticed", 1.0, 3600.0
    )
    # experts
    enable_expert_parallel: bool = option(
        False, "each rank has some experts whole, and not a part of each"
    )
    ep_backend: str = option(
        BACKENDS[0], "how tokens get to their experts", choices=BACKENDS, needs=EP
    )
    num_redundant_experts: int = option(0, "further copies of experts, in all", 0, 4096, needs=EP)
    eplb: bool = option(False, "place experts anew as tokens choose them", needs=EP)
    eplb_interval: int = option(
        3000, "steps after which a layer's experts are placed anew", 1, needs=("eplb", (True,))
    )
    data_parallel_size: int = option(
        1, "engines that share the experts, each started by itself", 1, 1024, needs=EP
    )
    data_parallel_rank: int = option(0, "which of them this is", 0, 1023, needs=EP)
    data_parallel_address: str | None = option(
        None, "where they meet: a file that is not there yet, or host:port of the first", needs=EP
    )
    # prefill and decode apart
    role: str = option("both", "prompts, tokens, both, or a proxy of such workers", choices=ROLES)
    kv_transfer: str = option("shm", "how blocks leave a worker", choices=TRANSPORTS, needs=PREFILL)
    kv_host: str | None = option(None, "address for tcp and nixl (loopback)", needs=PREFILL)
    kv_port: int = option(0, "port for tcp and nixl; 0 takes a free one", 0, 65535, needs=PREFILL)
    kv_secret_file: str | None = option(None, "the workers' secret (chmod 600)", needs=APART)
    kv_lease: float = option(30.0, "seconds that blocks wait to be fetched", 0.1, needs=PREFILL)
    kv_timeout: float = option(10.0, "seconds without progress of a fetch", 0.1, needs=DECODE)
    kv_min_tokens: int = option(64, "fewest tokens to fetch, not to compute", 1, needs=DECODE)
    kv_secret: str | None = field(default=None, repr=False)  # from the proxy that starts it
    # memory
    block_size: int | None = option(
        None, "tokens in a block of the KV cache (16; flash: 256)", 1, 4096
    )
    num_blocks: int | None = option(
        None, "blocks of the KV cache (as memory allows)", 1, 1 << 31, excludes="kv_cache_memory"
    )
    kv_cache_memory: int | None = option(
        None, "bytes for the KV cache (a share of what is free)", 1
    )
    prefix_cache: str = option(
        "hash", "how blocks of equal beginnings are found", choices=PREFIX_CACHES
    )
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory to use in all", 0.05, 1.0)
    # offload
    offload: str = option(
        "off",
        "what the host's memory keeps: preempted sequences (swap), cached prefixes, or both",
        choices=OFFLOADS,
    )
    host_kv_memory: int | None = option(
        None, "bytes for it (4 times the KV cache, as memory allows)", 1, needs=OFFLOADING
    )
    offload_policy: str = option(
        "lru", "which prefixes it forgets first", choices=("lru", "arc"), needs=KEEPING
    )
    disk_kv: str | None = option(None, "folder for prefixes that outlive a restart", needs=KEEPING)
    disk_kv_memory: int | None = option(None, "bytes that the folder may have (4 GiB)", 1)
    # scheduling
    async_scheduling: bool | None = option(
        None, "launch a step before the last one is read (on, except with speculative)"
    )
    continuous_batching: bool = option(
        True, "sequences join a batch that runs; off: when all of it have ended"
    )
    enable_chunked_prefill: bool = option(
        True,
        "cut prompts into slices beside sequences that decode; off: whole, in steps of their own",
    )
    max_num_seqs: int | None = option(
        None, "sequences in one batch (32 on a CPU, 256 on a GPU)", 1, 4096
    )
    max_num_batched_tokens: int | None = option(
        None,
        "tokens that one step may run (256 on a CPU, 8192 on a GPU; of whole prompts 2048 on a CPU)",
        1,
        1 << 20,
    )
    long_prefill_threshold: int | None = option(
        None, "most tokens of one sequence in a step (the step's budget)", 1, needs=SLICES
    )
    # structured output
    tool_call_parser: str = option(
        "auto", "how calls of tools are written; auto: as the chat template says", choices=PARSERS
    )
    # sleep
    sleep_requests: str = option(
        "wait",
        "requests that come while the engine sleeps wait, or get a 503",
        choices=SLEEP_REQUESTS,
    )
    # graphs
    enforce_eager: bool = option(
        False,
        "launch every kernel of every step from Python: no CUDA graphs, nor a CPU's recordings",
    )
    compile: str = option(
        "off",
        "what torch.compile compiles: norms and activation (ops), or whole layers",
        choices=("off", "ops", "layers"),
    )
    # speculation
    speculative: str = option(
        "off",
        "what drafts: ngram (the text), draft (a smaller model), self (some layers)",
        choices=PROPOSERS,
    )
    num_speculative_tokens: int | None = option(
        None, "most tokens of a draft (12 for ngram, else 4)", 1, 64, needs=DRAFTING
    )
    prompt_lookup_min: int | None = option(
        None, "ngram: fewest tokens that must match (2)", 1, 16, needs=NGRAM
    )
    prompt_lookup_max: int | None = option(
        None, "ngram: most tokens that must match (4)", 1, 16, needs=NGRAM
    )
    draft_model: str | None = option(
        None,
        "draft: the smaller model, named as --model is; self-FORMAT: this one, quantised",
        needs=DRAFT,
    )
    draft_layers: int | None = option(
        None, "self: how many layers draft (two thirds of them)", 1, needs=SELF
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.speculative == "draft" and self.draft_model is None:
            raise ValueError("speculative is draft: draft_model must name the smaller model")
        number, size = self.data_parallel_rank, self.data_parallel_size
        if number >= size:
            raise ValueError(f"data_parallel_rank is {number}: data_parallel_size is {size}")
        if size > 1 and self.data_parallel_address is None:
            raise ValueError(f"data_parallel_size is {size}: data_parallel_address must be given")
        if self.disk_kv is None and self.disk_kv_memory is not None:
            raise ValueError("disk_kv_memory has no effect without disk_kv")
        low, high = self.prompt_lookup_min or 2, self.prompt_lookup_max or 4
        if low > high:
            raise ValueError(f"prompt_lookup_min is {low}, above prompt_lookup_max, {high}")
        check_composition(self)

    def most_tokens(self, max_model_len: int) -> int:
        """Tokens of the largest step: a prompt that is not sliced may be longer than the budget."""
        longest = 0 if self.enable_chunked_prefill else max_model_len
        return max(self.max_num_batched_tokens, longest)

    def here(self) -> "EngineConfig":
        """With the device, kernels and defaults that it has on this machine. Raises ValueError."""
        device, dtype = resolve_device(self.device, self.dtype)
        ops = select_ops(self.kernels, device, self.threads or 1)
        found = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        return replace(self, kernels=ops.name, **found).resolved(device, ops.default_block_size)

    @property
    def has_core_process(self) -> bool:
        """Whether a server's engine runs in a process of its own."""
        return self.engine_core == "process" or self.api_server_count > 1

    def resolved(self, device: torch.device, default_block_size: int) -> "EngineConfig":
        """This configuration with the defaults that depend on device and kernels."""
        is_async = self.async_scheduling
        return replace(
            self,
            async_scheduling=self.speculative == "off" if is_async is None else is_async,
            block_size=self.block_size or default_block_size,
            max_num_seqs=self.max_num_seqs or (256 if device.type == "cuda" else 32),
            max_num_batched_tokens=self.max_num_batched_tokens
            or (8192 if device.type == "cuda" else 256 if self.enable_chunked_prefill else 2048),
            num_speculative_tokens=self.num_speculative_tokens
            or {"off": None, "ngram": 12}.get(self.speculative, 4),
        )
