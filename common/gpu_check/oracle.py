"""A part against transformers, on tiny random models.

In float32 the oracle of the test suite decides, token by token, and must fail where the context it
is given is damaged. In bfloat16 no two implementations round alike, and a random model turns small
differences into other tokens. So the yardstick is transformers itself in bfloat16, on the same
device and teacher-forced along the same tokens: how far below the float32 reference's best logit
its choices lie, and how far ours.
"""

import random
from collections.abc import Iterator
from typing import Any

from common.gpu_check.engines import engine_of, threads_of
from common.gpu_check.items import Check

PROMPT_LENGTHS = (1, 3, 16, 17, 40, 63, 130, 200)
TIMES_YARDSTICK = 2.0  # our mean gap may be so many times transformers' own,
SLACK = 0.02  # and so much more, of a logit
THREADS = 2  # the reference runs on the CPU, and so do the other processes
NUM_BLOCKS = 512  # of the KV cache: several engines share the GPU's memory

Pairs = list[tuple[list[int], list[int]]]  # prompts and outputs, token ids


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"part", "device", "quick", "choices": [(model, dtype)]} -> one check for each choice."""
    import torch

    torch.set_num_threads(threads_of(job) or THREADS)
    for model, dtype in job["choices"]:
        check = equality if dtype == "float32" else closeness
        name = f"part {job['part']:02d}, {model}, {dtype}"
        yield name, lambda check=check, model=model: check(job, model)


def outputs_of(job: dict[str, Any], model: str, dtype: str) -> Pairs:
    """Greedy outputs of the part for prompts of many lengths, in batches and more than one."""
    from common.sampling import SamplingParams

    sizes = {"max_num_seqs": 5, "num_blocks": NUM_BLOCKS, "threads": threads_of(job) or THREADS}
    engine = engine_of(job | {"model": model}, dtype=dtype, **sizes)[0]
    draw = random.Random(model)
    lengths = PROMPT_LENGTHS[:4] if job["quick"] else PROMPT_LENGTHS
    prompts = [[draw.randrange(2, 512) for _ in range(length)] for length in lengths]
    num_tokens = 24 if job["quick"] else 64
    params = [
        SamplingParams(temperature=0, max_tokens=num_tokens - 3 * i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    completions = engine.generate(prompts, params, progress=False)
    engine.shutdown()
    return [(prompt, done.token_ids) for prompt, done in zip(prompts, completions, strict=True)]


def equality(job: dict[str, Any], model: str) -> dict[str, Any]:
    """The oracle's verdict in float32, and on damaged contexts, which it must not let pass."""
    from common.testing.oracle import check_greedy

    pairs = outputs_of(job, model, "float32")
    verdict = check_greedy(model, pairs)
    assert verdict.num_tokens and verdict.is_right, str(verdict)
    for damage in ("cut", "shift"):
        wrong = check_greedy(model, [pair for pair in pairs if len(pair[0]) > 1], damage)
        assert not wrong.is_right, f"the oracle lets a context with {damage!r} pass: {wrong}"
    return {
        "num_tokens": verdict.num_tokens,
        "num_other": verdict.num_other,
        "worst_gap": verdict.worst,
    }


def closeness(job: dict[str, Any], model: str) -> dict[str, Any]:
    """Mean gaps of our bfloat16 tokens and of transformers' own, in logits of the reference."""
    import torch

    from common.models.checkpoint import load_transformers_model, resolve

    pairs = outputs_of(job, model, "bfloat16")
    yardstick = load_transformers_model(resolve(model), torch.bfloat16, job["device"])
    ours, theirs = gaps(model, pairs, yardstick)
    damaged, _ = gaps(model, [(prompt[1:], output) for prompt, output in pairs[1:]], yardstick)
    limit = TIMES_YARDSTICK * theirs + SLACK
    found = {"mean_gap": ours, "yardstick": theirs, "limit": limit, "damaged_gap": damaged}
    assert ours <= limit, f"tokens are too far from the reference's choice: {found}"
    assert damaged > limit, f"tokens of another context would pass too: {found}"
    return found


def gaps(model: str, pairs: Pairs, yardstick: Any) -> tuple[float, float]:
    """How far below the float32 reference's best logit the outputs' tokens lie on average, and the
    yardstick's choices at the same places."""
    import torch

    from common.testing.oracle import reference_logits

    ours, theirs = [], []
    for prompt, output in pairs:
        logits = reference_logits(model, prompt, output)  # [len(output), vocab]
        token_ids = torch.tensor([prompt + output[:-1]], device=yardstick.device)
        with torch.inference_mode():
            choices = yardstick(token_ids, logits_to_keep=len(output)).logits[0].argmax(-1).cpu()
        best = logits.max(-1).values
        ours.append(best - logits.gather(1, torch.tensor(output)[:, None])[:, 0])
        theirs.append(best - logits.gather(1, choices[:, None])[:, 0])
    return torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()
