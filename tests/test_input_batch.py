"""The input of a step, from part 05 on: packed buffers, block tables on the device, padding."""

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.packed_fields import PackedFields
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.kernels.launches import recorded
from common.testing.no_syncs import NoSyncs
from common.testing.parts import PARTS, distinct_files, engine_of, module_of

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = [3, 4, 5]


SHAPES = st.tuples(*[st.integers(1, 40)] * 4)


@pytest.mark.parametrize("part", distinct_files("input_buffers.py"))
@given(SHAPES)
@settings(max_examples=100, deadline=None)
def test_packed_fields_do_not_overlap(part: int, numbers: tuple[int, int, int, int]) -> None:
    """Each field is written with its own number; all are read back whole, at aligned addresses."""
    module = module_of(part, "input_buffers")
    shape, largest = module.BatchShape(*numbers), module.BatchShape(40, 40, 40, 40)
    small = module.BatchShape(4, 40, 40, 40)
    buffers = module.InputBuffers([small, largest], torch.device("cpu"))
    arrays, tensors = buffers.next(shape)
    tensors = dict(tensors)
    for number, array in enumerate(arrays.values()):
        array[:] = number
    buffers.copy_to_device(shape)
    for number, (name, tensor) in enumerate(tensors.items()):
        assert tensor.data_ptr() % 64 == buffers.hosts[buffers.turn].words.data_ptr() % 64, name
        assert (tensor == number).all(), name
        assert len(tensor) == len(arrays[name]) == shape.lengths()[name], name
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert [len(side["token_ids"]) for side in buffers.next(largest)] == [40, 40]
    other = replace(shape, num_seqs=41 - shape.num_seqs, num_sampled=1, num_changes=3)
    _, tensors = buffers.next(other)
    again = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert again == places, "a field lies at one place, whatever the other fields' lengths"
    with pytest.raises(ValueError, match="room"):
        buffers.next(replace(largest, num_tokens=41))


def test_a_gpu_gets_one_copy_of_what_there_is() -> None:
    """A second buffer plays the GPU's: all of a batch arrives there, none of the rest."""
    module = module_of(5, "input_buffers")
    largest = module.BatchShape(3, 3, 3, 100)
    buffers = module.InputBuffers([largest], torch.device("cpu"))
    sizes = module.FORMATS, [largest.lengths()], torch.device("cpu")
    buffers.device = PackedFields(*sizes)
    buffers.device.words.fill_(-1)
    for count in (5, 2):
        shape = module.BatchShape(2, 1, 1, count)
        arrays, tensors = buffers.next(shape)
        arrays["rows"][:], arrays["table_changes"][:] = count, range(2 * count)
        buffers.copy_to_device(shape)
        assert tensors["rows"].tolist() == [count]
        assert tensors["table_changes"].tolist() == [*range(2 * count)]
    begin = buffers.device.layouts[0].begins["table_changes"]
    on_device = buffers.device.words[begin:].view(torch.int32).tolist()
    assert on_device == [*range(10)] + [-1] * (len(on_device) - 10)


@pytest.mark.parametrize("part", distinct_files("input_batch.py"))
def test_the_packed_batch_says_what_is_scheduled(part: int) -> None:
    """A prompt beside a decode row, read back from the buffer and held against plain arithmetic."""
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    sequence_class = module_of(part, "sequence").Sequence
    no_end = frozenset({1})
    old = sequence_class(
        Request("old", [7] * 6, GREEDY), 9, no_end, 20, row=2, num_computed_tokens=6
    )
    old.num_total_tokens += 1
    old.extend([42])
    old.block_table = [9, 3]
    params = SamplingParams(top_k=5, presence_penalty=0.5, min_tokens=2)
    request = Request("new", [11, 12, 13], params, choice=2)
    new = sequence_class(request, 2**64 - 1, no_end, 20, row=0)
    new.block_table = [5]
    scheduler_output = module_of(part, "scheduler").SchedulerOutput
    output = scheduler_output(admitted=[new, old])
    output.run(new, 3)
    output.run(old, 1)
    assert output.num_tokens == 4 and output.sampled == [new, old]
    runner = engine.runner
    batch = runner.prepare(output)
    runner.counts.fill_(9)
    runner.fill_in(batch)
    assert batch.token_ids.tolist() == [11, 12, 13, 42]
    assert batch.positions.tolist() == [0, 1, 2, 6]
    assert batch.metadata.cu_seqlens_q.tolist() == [0, 3, 4]
    assert batch.metadata.seq_lens.tolist() == [3, 7]
    assert batch.metadata.slot_mapping.tolist() == [20, 21, 22, 14]
    tables = batch.metadata.block_tables
    assert tables[0, 0] == 5 and tables[1, :2].tolist() == [9, 3]
    assert (batch.metadata.max_query_len, batch.metadata.max_seq_len) == (3, 7)
    assert batch.metadata.max_decode_query_len == 1
    assert batch.metadata.num_leading_decodes == 0, "a prompt comes first"
    assert batch.logits_indices.tolist() == [2, 3]
    assert batch.rows.tolist() == [0, 2]
    assert batch.has_penalties and batch.joining.rows.tolist() == [0]
    assert (runner.counts[0] == 0).all() and (runner.counts[1:] == 9).all()
    assert batch.sampling.seeds.tolist() == [[-1], [9]]
    assert batch.sampling.choices.tolist() == [[2], [0]]
    assert batch.sampling.positions.tolist() == [[3], [7]]
    assert batch.sampling.top_k.tolist() == [[5], [0]]
    assert batch.sampling.presence_penalty.tolist() == [[0.5], [0.0]]
    assert np.allclose(batch.sampling.temperature, [[1.0], [0.0]])
    biased = batch.sampling.biased(torch.zeros(2, engine.vocab_size))
    assert biased[0, 1] == -torch.inf and (biased[1] == 0).all(), "not its end before min_tokens"
    old.num_computed_tokens, old.num_total_tokens, new.num_computed_tokens = 7, 8, 1
    old.block_table.append(8)
    later = scheduler_output(new_blocks={old: [8]})
    later.run(old, 1)
    later.run(new, 1)
    assert later.sampled == [old], "sampled only after its last token"
    batch = runner.prepare(later)
    assert batch.metadata.num_leading_decodes == 2
    assert batch.token_ids.tolist() == [-1 - 2, 12], "what row 2 has drawn is not known yet"
    runner.fill_in(batch)
    assert tables[0, :3].tolist() == [9, 3, 8] and tables[1, 0] == 5, "where they were"
    assert batch.metadata.slot_mapping.tolist() == [15, 21]
    assert batch.logits_indices.tolist() == [0] and batch.rows.tolist() == [2]
    old.num_computed_tokens, old.num_total_tokens = 8, 9
    third = scheduler_output()
    third.run(old, 1)
    assert engine.runner.prepare(third).metadata.slot_mapping.tolist() == [32]
    assert batch.sampling.num_logprobs == [None] and not batch.has_penalties


@pytest.mark.parametrize("part", distinct_files("input_batch.py"))
def test_what_the_device_has_drawn_is_filled_in_by_row(part: int) -> None:
    runner = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8).runner
    sequence_class = module_of(part, "sequence").Sequence
    output = module_of(part, "scheduler").SchedulerOutput()
    for row in (3, 0):
        sequence = sequence_class(Request(f"{row}", [7], GREEDY), 0, frozenset(), 9, row=row)
        sequence.num_computed_tokens, sequence.num_total_tokens = 1, 2
        sequence.block_table = [row]
        output.admitted.append(sequence)
        output.run(sequence, 1)
    batch = runner.prepare(output)
    runner.last_token_ids[:4] = torch.tensor([100, 101, 102, 103])
    runner.fill_in(batch)
    assert batch.token_ids.tolist() == [103, 100]


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 5])
def test_a_step_says_what_its_input_takes(part: int) -> None:
    """Both buffers, the tables, and the counts of tokens; all of it from the start."""
    config = module_of(part, "config").EngineConfig(
        model=MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8
    )
    engine = module_of(part, "engine").LLMEngine(config)
    inputs = engine.runner.inputs
    stats = engine.stats()
    per_token = 2 * engine.runner.model.config.num_layers * engine.kv.data[0, 0, 0, 0].nbytes
    assert stats["kv_cache_bytes"] == 64 * 4 * per_token
    assert stats["weight_bytes"] == engine.runner.model.num_bytes > 0
    hosts, tables = inputs.buffers.hosts, inputs.tables
    assert len({buffer.words.data_ptr() for buffer in hosts}) == 2
    before = stats["buffer_bytes"]
    known = sum(buffer.words.nbytes for buffer in hosts) + 3 * tables.host.nbytes
    assert before > known + 8 * engine.vocab_size * 4
    engine.generate([PROMPT], replace(GREEDY, frequency_penalty=0.1), progress=False)
    assert engine.stats()["buffer_bytes"] == before


@pytest.mark.parametrize("part", [part for part in distinct_files("model_runner.py") if part >= 5])
def test_the_buffers_hold_the_largest_step(part: int) -> None:
    """What a GPU's memory is sized by; here it must only run. And more rows than tokens of context."""
    flags = {"max_model_len": 12, "max_num_seqs": 40, "num_blocks": 40}
    engine = engine_of(part, MODEL, threads=1, max_num_batched_tokens=60, **flags)
    runner = engine.runner
    largest = runner.largest_step(12)
    batch = runner.prepare(largest)
    assert batch.metadata.seq_lens.tolist() == [12, 10] + [1] * 38
    assert len(batch.token_ids) == largest.num_tokens == 60
    token_ids, _ = runner.launch(batch).result().lists()
    assert len(token_ids) == 40
    outputs = engine.generate([[2]] * 45, replace(GREEDY, max_tokens=4), progress=False)
    assert len({tuple(output.token_ids) for output in outputs}) == 1


@pytest.mark.parametrize("part", distinct_files("input_buffers.py"))
def test_a_buffer_that_is_read_is_not_written(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is in flight, the next one fails when its buffer is half written: the one after that
    waits for the first step's buffer."""
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    [expected] = engine.generate([PROMPT], GREEDY, progress=False)
    gate, fill_in = threading.Semaphore(0), engine.runner.fill_in

    def held(batch: Any, *what: Any) -> None:
        assert gate.acquire(timeout=60)
        fill_in(batch, *what)

    def fail(*_: Any) -> None:
        raise RuntimeError("late in prepare")

    monkeypatch.setattr(engine.runner, "fill_in", held)
    engine.num_in_flight = 2
    engine.add_request(Request("a", PROMPT, GREEDY))
    engine.step()
    engine.add_request(Request("b", [9] * 7, GREEDY))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="late"):
        patch.setattr(engine.runner.inputs, "sampling_batch", fail)
        engine.step()
    buffers = engine.runner.inputs.buffers
    first = next(reader for reader in buffers.readers if reader is not None and not is_done(reader))
    assert buffers.readers.index(first) != buffers.turn, "the step in flight reads the other one"
    shape = module_of(part, "input_buffers").BatchShape(1, 1, 1, 0)
    threading.Timer(0.2, gate.release).start()
    buffers.next(shape)
    assert is_done(first)
    gate.release(50)
    engine.drop_requests()
    monkeypatch.undo()
    assert engine.generate([PROMPT], GREEDY, progress=False)[0].token_ids == expected.token_ids


def is_done(work: Any) -> bool:
    return work.future.done()


# Block tables on the device.


WRITES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 5),
        st.lists(st.integers(0, 99), max_size=4),
        st.booleans(),
    ),
    max_size=20,
)


@given(WRITES, st.lists(st.integers(0, 4), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_device_is_told_what_has_changed(
    writes: list[tuple[int, int, list[int], bool]], rows: list[int]
) -> None:
    """Whatever is written, in however many steps: the device has what the host has."""
    tables = module_of(5, "block_tables").BlockTables(4, 9, torch.device("cpu"))
    expected = np.zeros((5, 9), np.int32)
    address = tables.of_batch.data_ptr()

    def step() -> None:
        places, blocks = tables.take_changes()
        assert len(places) == len(set(places.tolist())), "each place once"
        changes = torch.from_numpy(np.stack([places, blocks]))
        tables.update(changes, torch.tensor(rows))
        assert (tables.device.numpy() == expected).all() and (tables.host == expected).all()
        assert (tables.of_batch[: len(rows)].numpy() == expected[rows]).all()

    for row, begin, blocks, ends_step in writes:
        tables.write(row, begin, blocks)
        expected[row, begin : begin + len(blocks)] = blocks
        if ends_step:
            step()
    step()
    assert len(tables.take_changes()[0]) == 0, "nothing is told twice"
    assert tables.of_batch.data_ptr() == address and (expected[tables.padding_row] == 0).all()


@pytest.mark.parametrize("part", distinct_files("input_batch.py"))
def test_a_decode_step_says_little_about_tables(part: int) -> None:
    """Sequences with long tables: what is copied does not grow with them."""
    engine = engine_of(part, MODEL, threads=1, num_blocks=200, block_size=1, max_num_seqs=4)
    batches = []
    prepare = engine.runner.prepare
    engine.runner.prepare = lambda scheduled: batches.append(prepare(scheduled)) or batches[-1]
    params = replace(GREEDY, max_tokens=6, ignore_eos=True)
    engine.generate([[2] * 40, [3] * 30], params, progress=False)
    numbers = [batch.table_changes.shape[1] for batch in batches]
    assert sum(numbers) == (40 + 30) + 2 * 5 and numbers[-3:] == [2, 2, 2]


# Padding.


def decoding(engine: Any, part: int, lengths: list[int]) -> Any:
    """What the scheduler says about sequences of these lengths that decode their last token, the
    KV cache behind them filled by a forward."""
    modules = [module_of(part, name) for name in ("sequence", "scheduler")]
    prompts, steps = modules[1].SchedulerOutput(), modules[1].SchedulerOutput()
    size, block = engine.kv.block_size, 0
    for row, length in enumerate(lengths):
        tokens = [(7 * row + place) % 50 + 3 for place in range(length)]
        request = Request(f"{row}", tokens, GREEDY)
        sequence = modules[0].Sequence(request, 0, frozenset(), length + 9, row=row)
        num_blocks = length // size + 1
        sequence.block_table = list(range(block, block + num_blocks))
        block += num_blocks
        prompts.admitted.append(sequence)
        prompts.run(sequence, length)
    engine.runner.launch(engine.runner.prepare(prompts)).result()
    for sequence in prompts.num_new_tokens:
        sequence.num_total_tokens += 1
        sequence.extend([11])
        sequence.num_computed_tokens = len(sequence.prompt_token_ids)
        steps.run(sequence, 1)
    return steps


def prepared(inputs: Any, steps: Any, bucket: Any) -> Any:
    """A batch that is padded up to a bucket, which part 15 finds by itself."""
    if not hasattr(inputs, "find_bucket"):
        return inputs.prepare(steps, bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "find_bucket", lambda counts: bucket)
        return inputs.prepare(steps)


@pytest.mark.parametrize("part", distinct_files("input_batch.py"))
def test_padding_changes_nothing(part: int) -> None:
    """Of a padded batch the sequences' logits are those of the batch itself, and neither the KV
    cache nor a table is written by the padding."""
    flags = {"max_model_len": 64, "num_blocks": 40, "block_size": 4, "max_num_seqs": 8}
    engine = engine_of(part, MODEL, threads=1, **flags)
    runner = engine.runner
    steps = decoding(engine, part, [9, 1, 30])
    plain = runner.prepare(steps)
    runner.fill_in(plain)
    expected = runner.forward(plain)[0].clone()  # a later step may compute in the same memory
    before = engine.kv.data.clone()
    bucket = module_of(part, "input_batch").Bucket(num_seqs=8, max_seq_len=32)
    batch = prepared(runner.inputs, steps, bucket)
    runner.fill_in(batch)
    assert batch.metadata.seq_lens.tolist() == [10, 2, 31] + [1] * 5
    assert batch.metadata.cu_seqlens_q.tolist() == list(range(9))
    assert batch.metadata.slot_mapping[3:].tolist() == [-1] * 5
    assert batch.token_ids.tolist() == [11] * 3 + [0] * 5
    assert (batch.metadata.max_query_len, batch.metadata.max_seq_len) == (1, 32)
    assert (batch.metadata.block_tables[3:] == 0).all()
    logits, _ = runner.forward(batch)
    assert len(logits) == len(batch.rows) == 3
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(engine.kv.data, before)
    assert runner.launch(batch).result().token_ids.tolist() == expected.argmax(dim=1).tolist()


@pytest.mark.parametrize("part", distinct_files("input_batch.py"))
def test_batches_of_one_bucket_lie_at_the_same_places(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when other batches come between, when one is full and the other is not, and when table
    changes are many."""
    flags = {"max_model_len": 64, "num_blocks": 200, "block_size": 4, "max_num_seqs": 8}
    engine = engine_of(part, MODEL, threads=1, max_num_batched_tokens=500, **flags)
    inputs = engine.runner.inputs
    monkeypatch.setattr(
        inputs.buffers, "device", copy.deepcopy(inputs.buffers.hosts[0])
    )  # plays a GPU's
    bucket = module_of(part, "input_batch").Bucket(num_seqs=8, max_seq_len=64)
    places = set()
    for lengths in ([9, 1, 30], [60] * 8, [2]):
        steps = decoding(engine, part, lengths)
        engine.runner.prepare(steps)
        batch = prepared(inputs, steps, bucket)
        tensors = [
            batch.token_ids,
            batch.positions,
            batch.table_rows,
            *vars(batch.metadata).values(),
        ]
        places.add(
            tuple(
                (x.data_ptr(), x.shape, x.stride()) if isinstance(x, torch.Tensor) else x
                for x in tensors
            )
        )
    assert len(places) == 1


# What a GPU would be given.


WITH_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def engine_for_a_gpu(part: int, patch: pytest.MonkeyPatch, **flags: Any) -> tuple[Any, set[Any]]:
    """An engine with a GPU's kernels, none of which is run, and what it compiles at its start."""
    from common.kernels.triton.ops import TritonOps

    class Launching(TritonOps):
        def sample(self, logits: torch.Tensor, *arguments: Any, **columns: Any) -> torch.Tensor:
            return torch.zeros_like(super().sample(logits, *arguments, **columns))

    patch.setattr(module_of(part, "model_runner"), "select_ops", lambda *which: Launching())
    config = module_of(part, "config").EngineConfig(
        model=MODEL, threads=1, max_model_len=1024, num_blocks=400, max_num_seqs=8, **flags
    )
    with recorded() as launches:
        engine = module_of(part, "engine").LLMEngine(config)
    return engine, {launch.variant for launch in launches}


def flat(item: Any) -> Iterator[torch.Tensor]:
    """The tensors in an object of a model."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for one in item:
            yield from flat(one)
    elif hasattr(item, "__dict__"):
        yield from flat(list(vars(item).values()))


@WITH_TRITON
@pytest.mark.parametrize("part", distinct_files("input_batch.py"))
def test_batches_of_one_bucket_are_launched_alike(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph needs: the same kernels with the same grids and numbers, on the same places
    of all that stays. What a forward allocates for itself is the graph's own in every replay."""
    engine, _ = engine_for_a_gpu(part, monkeypatch, block_size=4, max_num_batched_tokens=2048)
    runner, inputs = engine.runner, engine.runner.inputs
    inputs.buffers.device = copy.deepcopy(inputs.buffers.hosts[0])  # plays a GPU's
    stays = [inputs.buffers.device.words, inputs.tables.of_batch, engine.kv.data]
    stays += flat(runner.model)
    pieces = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in stays]
    bucket = module_of(part, "input_batch").Bucket(num_seqs=8, max_seq_len=1024)

    def launch_list(lengths: list[int]) -> list[Any]:
        with recorded():
            steps = decoding(engine, part, lengths)
        batch = prepared(inputs, steps, bucket)
        with recorded() as launches, torch.inference_mode():
            runner.model.forward(
                batch.token_ids.clamp(min=0), batch.positions, engine.kv.data, batch.metadata
            )
        return [
            (
                *launch.variant,
                launch.grid,
                launch.numbers,
                [x if any(x in piece for piece in pieces) else None for x in launch.addresses],
            )
            for launch in launches
        ]

    lists = [launch_list(lengths) for lengths in ([9, 1, 30], [40] * 8, [900])]
    assert lists[0] == lists[1] == lists[2]
    kernels = [launch[0] for launch in lists[0]]
    per_layer = len(kernels) / runner.model.config.num_layers
    assert "combine_kernel" in kernels, "long sequences are split, so all are"
    assert 5 < per_layer < 7, kernels
    known = [x for launch in lists[0] for x in launch[-1] if x is not None]
    assert len(set(known)) > 8, "the check sees addresses of what stays"
    with recorded():
        steps = decoding(engine, part, [9, 1, 30])
    with recorded() as launches:
        runner.run(runner.prepare(steps))
    plain = [launch.grid for launch in launches if launch.kernel == "attention_kernel"]
    grids = [launch[5] for launch in lists[0] if launch[0] == "attention_kernel"]
    assert plain != grids, "a batch without a bucket is launched as it is"


LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 700)), min_size=1, max_size=8)
WISHES = [
    GREEDY,
    SamplingParams(),
    SamplingParams(top_p=0.5, min_p=0.1),
    SamplingParams(top_k=3),
    SamplingParams(presence_penalty=1.0, logprobs=2),
    SamplingParams(logit_bias={3: 5.0}, prompt_logprobs=1),
]


@WITH_TRITON
@pytest.mark.parametrize("part", distinct_files("model_runner.py")[-2:])
def test_an_engine_compiles_nothing_after_its_start(part: int) -> None:
    """Whatever runs in a step, its kernels are among those of the warm-up."""
    drafting = {"speculative": "self", "num_speculative_tokens": 3} if part >= 8 else {}
    with pytest.MonkeyPatch.context() as patch:
        engine, warm = engine_for_a_gpu(part, patch, max_num_batched_tokens=2400, **drafting)

        @given(LENGTHS, st.sampled_from(WISHES))
        @settings(max_examples=40, deadline=None)
        def check(lengths: list[tuple[int, int]], params: SamplingParams) -> None:
            step = engine.runner.made_up([(new, new + old) for new, old in lengths], params)
            with recorded() as launches:
                engine.runner.launch(engine.runner.prepare(step)).result()
            assert {launch.variant for launch in launches} <= warm

        check()


KINDS = [
    SamplingParams(max_tokens=30, ignore_eos=True, **kind)
    for kind in (
        {"temperature": 0.0},
        {},
        {"top_k": 3, "top_p": 0.8, "seed": 3, "logprobs": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 0},
        {"logit_bias": {5: 3.0}, "min_tokens": 3},
        {"prompt_logprobs": 2, "n": 2},
    )
]


@pytest.mark.parametrize("proposer", [None, "ngram", "self", "draft"])
@pytest.mark.parametrize("part", [part for part in distinct_files("model_runner.py") if part >= 5])
def test_no_step_waits_for_the_device(part: int, proposer: str | None) -> None:
    """Requests of all kinds together, also when they come back from a preemption."""
    if proposer and part < 8:
        pytest.skip("drafts come with part 08")
    flags: dict[str, Any] = {"num_blocks": 22, "block_size": 4, "max_num_seqs": 8}
    if proposer:
        flags |= {"speculative": proposer, "num_speculative_tokens": 3}
        flags |= {"draft_model": MODEL} if proposer == "draft" else {}
    config = module_of(part, "config").EngineConfig(model=MODEL, threads=1, **flags)
    engine = module_of(part, "engine").LLMEngine(config)
    watched = []

    def watch(runs: Any) -> None:
        run = runs.run

        def run_without_waiting(*arguments: Any) -> Any:
            with NoSyncs():
                watched.append(runs)
                return run(*arguments)

        runs.run = run_without_waiting

    watch(engine.runner)
    if proposer:
        engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: list(limits)
    if proposer in ("self", "draft"):
        watch(engine.speculator.proposer)
    prompts = [[3 + i, 4, 5, 6] * 3 for i in range(len(KINDS))]
    completions = engine.generate(prompts, KINDS, progress=False)
    assert all(c.finish_reason == "length" for c in completions)
    assert engine.stats()["num_preemptions"] > 0
    assert len(watched) > 10
