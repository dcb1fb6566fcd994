"""Questions with four answers: which has the largest likelihood after the prompt?"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.texts import QUESTIONS

Logits = Callable[[list[list[int]]], Iterator[Tensor]]  # after the last token of each, [1, vocab]


@dataclass(frozen=True)
class Question:
    """kind: `choice` or `sum`. choices: token ids of each. answer: the right one's index."""

    kind: str
    prompt: list[int]
    choices: list[list[int]]
    answer: int


def load_questions(encode: Callable[[str], list[int]], path: Path = QUESTIONS) -> list[Question]:
    """Raises ValueError that names the item."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["questions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"questions {path}: {error}") from None
    found = []
    for number, item in enumerate(items):
        choices, answer = item["choices"], item["answer"]
        if len(set(choices)) != len(choices) or answer not in range(len(choices)):
            raise ValueError(f"questions {path}: item {number} has {choices}, answer {answer}")
        own = [encode(choice) for choice in choices]
        found.append(Question(item["kind"], encode(item["prompt"]), own, answer))
    return found


def answers(questions: list[Question], logits: Logits) -> list[int]:
    """The chosen index of each question. Sequences that questions share are run once."""
    wanted = dict.fromkeys(
        tuple(question.prompt + choice[:place])
        for question in questions
        for choice in question.choices
        for place in range(len(choice))
    )
    # Of every sequence only what comes next is kept: the log probabilities of the choices' tokens.
    following: dict[tuple[int, ...], set[int]] = {sequence: set() for sequence in wanted}
    for question in questions:
        for choice in question.choices:
            for place, token in enumerate(choice):
                following[tuple(question.prompt + choice[:place])].add(token)
    score: dict[tuple[tuple[int, ...], int], float] = {}
    for sequence, row in zip(wanted, logits([list(one) for one in wanted]), strict=True):
        logprobs = row[0].log_softmax(dim=-1)
        score |= {(sequence, token): logprobs[token].item() for token in following[sequence]}
    return [best(question, score) for question in questions]


def best(question: Question, score: dict[tuple[tuple[int, ...], int], float]) -> int:
    """The first choice of the largest likelihood."""
    totals = [
        sum(score[tuple(question.prompt + choice[:i]), token] for i, token in enumerate(choice))
        for choice in question.choices
    ]
    return totals.index(max(totals))
