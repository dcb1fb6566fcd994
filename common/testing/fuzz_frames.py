"""Fuzzing the frame parser and the messages with atheris: `python -m common.testing.fuzz_frames -runs=1000000`.

atheris is no dependency: pip install it into an environment of its own. The arguments are libFuzzer's. The
first byte of an input says how the rest is cut and whether the greeting is over; a stream that begins
with a right header and checksum is made of the rest, too, so that messages are reached. Anything but a
refusal is a finding, and so is a parser that holds more than it has been sent and its limits allow.
"""

import sys

import atheris

with atheris.instrument_imports(include=["common.kv_transfer"]):
    import msgspec

    from common.kv_transfer import messages as m
    from common.kv_transfer.fetching import Transfer
    from common.kv_transfer.frames import FrameError, FrameParser, encode

PAYLOAD_LIMIT = 1 << 12


def feed(parser: FrameParser, data: bytes, step: int) -> list[tuple[bytes, bytes]]:
    """Raises FrameError."""
    frames = []
    while data:
        space = parser.space()
        assert 0 < len(space) <= parser.message_limit + parser.payload_limit
        count = min(len(space), len(data), step)
        space[:count] = data[:count]
        data = data[count:]
        frame = parser.advance(count)
        if frame is not None:
            frames.append((bytes(frame[0]), bytes(frame[1])))
    return frames


def hear(message: bytes) -> None:
    """What a receiver and a sender make of it."""
    for decoder in (m.from_sender, m.from_receiver):
        try:
            known = decoder.decode(message)
        except msgspec.DecodeError:
            continue
        assert decoder.decode(m.encoder.encode(known)) == known
        transfer = Transfer("a", 3, 4)
        try:
            if isinstance(known, m.Ready):
                transfer.heard(known.new_blocks, known.layers, known.counts)
            if isinstance(known, m.Computed):
                transfer.heard_computed(known.num_blocks)
        except ValueError:
            continue
        assert len(transfer.remote) <= 4 and max(transfer.counts) <= len(transfer.remote)


def test_one_input(data: bytes) -> None:
    if not data:
        return
    choice, rest = data[0], data[1:]
    streams = [rest]
    if rest:
        cut = choice % (len(rest) + 1) or len(rest)
        streams.append(encode(0, rest[:cut], rest[cut:]) + rest[cut:])
    for stream in streams:
        parser = FrameParser()
        if choice & 1:
            parser.raise_limits(PAYLOAD_LIMIT)
        try:
            frames = feed(parser, stream, 1 + choice // 2)
        except FrameError:
            continue
        for message, _ in frames:
            hear(message)
    hear(rest)


def main() -> None:
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
