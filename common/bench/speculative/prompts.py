"""The prompts of `speculative`.

    copy   a text or a program to be corrected: the answer has most of it in it, which is what n-gram
           drafts are good at
    prose  a subject, and something to be written about it that nothing says before: what they are
           bad at

12 texts and 12 subjects with 3 tasks each are 36 different prompts of a kind; neighbours have neither
text nor task in common. The texts are such that even a model of 135M parameters copies them.
A model with random weights has no language to be asked in: there a copy is some token ids again and
again, and prose is token ids that do not repeat.
"""

from typing import Any

from common.bench.core.workload import random_prompts

WORKLOADS = ("copy", "prose")
RANDOM_BLOCK, RANDOM_REPEATS = 24, 4  # tokens of a copy prompt for a model with random weights

TEXT_TASKS = (
    "Correct the spelling mistakes in this text. Leave everything else as it is.\n\n{}",
    "Proofread this text and write it again with all mistakes corrected:\n\n{}",
    "Fix the grammar of this text:\n\n{}",
)
TEXTS = (
    "Dear Mrs Hollis, thank you for the key to the garden shed. I have repared the left door and"
    " painted both windows green, as you asked. The ladder stands behind the water barrel, and the"
    " bill from the hardware store lies on the kitchen table. Please feed the two hens untill I"
    " come back on Thursday. With kind regards, Tom Abernathy",
    "From 3 June the trains of line 5 run every twelve minutes. Between Elm Street and the harbour"
    " a bus takes the place of the train until 31 August, because the rails are being renewed."
    " Tickets are valid on the bus. Bicycles cannot be taken along. On Sundays the first train"
    " leaves Elm Street at 6:40 and the last one at 23:10.",
    "Potato soup for four. You need six potatoes, two carrots, one onion, a litre of broth and a"
    " spoon of butter. 1. Peel the potatoes and the carrots and cut them into cubes. 2. Fry the"
    " onion in the butter until it is golden. 3. Add the cubes and the broth and cook them for"
    " twenty minutes. 4. Mash half of the soup, stir, and serve it with fresh parsley.",
    "Tomorrow it will be cloudy in the north with light rain in the afternoon. In the south the fog"
    " will clear by ten o'clock, and the sun will shine for about six hours. Temperatures will"
    " reach 14 degrees on the coast and 19 degrees inland. The wind will blow from the west, at"
    " times strongly. On Wednesday it will be dry in the whole country, and the nights will be"
    " cold.",
    "The meeting of the library council began at seven. Present were Mr Okafor, Mrs Lindqvist and"
    " Dr Marsh. The council agreed to open the reading room on Sundays from May to September. Dr"
    " Marsh will ask the town for money for a new roof. Mrs Lindqvist reported that 214 books were"
    " lost last year, which is fewer than in the year before. The next meeting is on 4 March.",
    "Ada Brightwell was born in Bristol in 1887 as the third of five children. Her father was a"
    " glazier and her mother a teacher. At the age of fifteen she began to work in a printing"
    " house, where she learned to set type. In 1911 she moved to Dublin and opened a bookshop,"
    " which she kept until her death in 1956. Her letters are held by the library of Trinity"
    " College.",
    "A volcano is an opening in the crust of a planet through which lava, ash and gases escape."
    " Most volcanoes on Earth lie where tectonic plates move apart or colide. Lava that is thin"
    " flows far and builds shield volcanoes with gentle slopes; lava that is thick piles up into"
    " steep cones and may explode. About fifteen hundred volcanoes have been active in the last"
    " ten thousand years.",
    "The library lends books for four weeks and films for one week. A book can be renewed twice"
    " unless somebody else is waiting for it. For each day that a book is late the reader pays"
    " twenty cents. Readers who lose a book pay the price of a new one. Maps, newspapers and books"
    " printed before 1900 are not lent and must be read in the reading room.",
    "The tenant pays the rent on the first day of each month. The landlord keeps the roof, the"
    " heating and the pipes in working order. The tenant may keep one cat or one small dog. Both"
    " parties may end this agreement in writing with three months of notice. Damage that was there"
    " before the tenant moved in is listed in appendix B, and the tenant does not pay for it.",
    "The old bridge across the river Tarn was built in 1864 from grey granite. It has seven arches"
    " and is 212 metres long. During the flood of 1910 two of the arches collapsed, and for three"
    " years people crossed the river in small boats. Since 1987 cars are no longer allowed on the"
    " bridge, but every Saturday there is a market with fruit, cheese and flowers.",
)

PROGRAM_TASKS = (
    "Repeat this text word for word.\n\n{}",
    "Is there a mistake in this? Write the corrected version:\n\n```\n{}\n```",
    "Repeat this code:\n\n```\n{}\n```",
)
PROGRAMS = (
    "SELECT customers.name, customers.country, SUM(orders.total) AS spent\nFROM customers\n"
    "JOIN orders ON orders.customer_id = customers.id\nWHERE orders.created_at >= '2023-01-01'\n"
    "GROUP BY customers.name, customers.country\nHAVING SUM(orders.total) > 1000\n"
    "ORDER BY spent DESC\nLIMIT 20;",
    "def average_by_group(rows, group, value):\n    sums, counts = {}, {}\n    for row in rows:\n"
    "        key = row[group]\n        sums[key] = sums.get(key, 0) + row[value]\n"
    "        counts[key] = counts.get(key, 0) + 1\n"
    "    return {key: sums[key] / counts[key] for key in sums}",
)

PROSE_TASKS = (
    "Write a short story about {}.",
    "What should one know about {}? Explain it to somebody who has never heard of it.",
    "Write a letter to an old friend in which you talk about {}.",
)
SUBJECTS = (
    "a clockmaker who is afraid of time",
    "why the sea is salty",
    "moving from a village to a large city",
    "an orchestra on a ship",
    "how bread came to be",
    "the last train of the night",
    "learning to paint late in life",
    "a winter without snow",
    "the invention of the telephone",
    "two neighbours who share one garden",
    "what dreams may be good for",
    "a long walk through the desert",
)
MATERIAL = {
    "copy": [
        *((TEXT_TASKS, text) for text in TEXTS[:5]),
        (PROGRAM_TASKS, PROGRAMS[0]),
        *((TEXT_TASKS, text) for text in TEXTS[5:]),
        (PROGRAM_TASKS, PROGRAMS[1]),
    ],
    "prose": [(PROSE_TASKS, subject) for subject in SUBJECTS],
}


def text_prompt(workload: str, index: int) -> str:
    """One of the 36; then they come again."""
    material = MATERIAL[workload]
    again, place = divmod(index, len(material))
    tasks, subject = material[place]
    return tasks[(place + again) % len(tasks)].format(subject)


def random_prompt(workload: str, index: int, vocab_size: int, seed: int) -> list[int]:
    """As many tokens of either kind."""
    repeats = RANDOM_REPEATS if workload == "copy" else 1
    length = RANDOM_BLOCK * RANDOM_REPEATS // repeats
    [block] = random_prompts([length], vocab_size, f"{seed} {workload} {index}")
    return block * repeats


def prompt_token_ids(
    workload: str, index: int, tokenizer: Any, vocab_size: int, seed: int
) -> list[int]:
    """The prompt of that number, in the model's chat format; of random ids where the model has no
    tokenizer. Raises ValueError where it has no chat format."""
    if tokenizer is None:
        return random_prompt(workload, index, vocab_size, seed)
    return tokenizer.encode_chat([{"role": "user", "content": text_prompt(workload, index)}])
