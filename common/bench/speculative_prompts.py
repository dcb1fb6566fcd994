"""The prompts of `speculative`.

    copy   a text, and a task whose answer has most of the text in it: what n-gram drafts are good at
    prose  a subject, and something to be written about it that nothing says before: what they are bad at

12 texts and 12 subjects with 3 tasks each are 36 different prompts of a kind, in an order where
neighbours have nothing in common. A model with random weights has no language to be asked in: there
a copy is some token ids again and again, and prose is token ids that do not repeat.
"""

from typing import Any

from common.bench.workload import random_prompts

WORKLOADS = ("copy", "prose")
RANDOM_BLOCK, RANDOM_REPEATS = 24, 4  # tokens of a copy prompt for a model with random weights

COPY_TASKS = (
    "Repeat this text word for word.\n\n{}",
    "Correct the spelling mistakes in this text. Leave everything else as it is.\n\n{}",
    "Copy the whole text between the lines, without any change.\n\n---\n{}\n---",
)
COPY_TEXTS = (
    # A letter with mistakes.
    "Dear Mrs Hollis, thank you for the key to the garden shed. I have repared the left door and"
    " painted both windows green, as you asked. The ladder stands behind the water barrel, and the"
    " bill from the hardware store lies on the kitchen table. Please feed the two hens untill I"
    " come back on Thursday. With kind regards, Tom Abernathy",
    # JSON.
    '[{"name": "Amina", "city": "Lagos", "age": 34, "languages": ["Yoruba", "English"]},\n'
    ' {"name": "Jorge", "city": "Quito", "age": 27, "languages": ["Spanish", "Quechua"]},\n'
    ' {"name": "Mei", "city": "Taipei", "age": 41, "languages": ["Mandarin", "Japanese"]}]',
    # A recipe.
    "Potato soup for four. You need six potatoes, two carrots, one onion, a litre of broth and a"
    " spoon of butter. 1. Peel the potatoes and the carrots and cut them into cubes. 2. Fry the"
    " onion in the butter until it is golden. 3. Add the cubes and the broth and cook them for"
    " twenty minutes. 4. Mash half of the soup, stir, and serve it with fresh parsley.",
    # A program.
    "def average_by_group(rows, group, value):\n    sums, counts = {}, {}\n    for row in rows:\n"
    "        key = row[group]\n        sums[key] = sums.get(key, 0) + row[value]\n"
    "        counts[key] = counts.get(key, 0) + 1\n"
    "    return {key: sums[key] / counts[key] for key in sums}",
    # Minutes of a meeting.
    "The meeting of the library council began at seven. Present were Mr Okafor, Mrs Lindqvist and"
    " Dr Marsh. The council agreed to open the reading room on Sundays from May to September. Dr"
    " Marsh will ask the town for money for a new roof. Mrs Lindqvist reported that 214 books were"
    " lost last year, which is fewer than in the year before. The next meeting is on 4 March.",
    # A table.
    "station,line,opened,platforms,passengers\nHarbour,red,1931,4,18200\n"
    "Old Market,red,1931,2,9700\nUniversity,blue,1968,3,22400\nStadium,blue,1974,6,7100\n"
    "Airport,green,1999,2,15800\nFerry Road,green,2003,2,3900",
    # Notes of a lesson.
    "A volcano is an opening in the crust of a planet through which lava, ash and gases escape."
    " Most volcanoes on Earth lie where tectonic plates move apart or colide. Lava that is thin"
    " flows far and builds shield volcanoes with gentle slopes; lava that is thick piles up into"
    " steep cones and may explode. About fifteen hundred volcanoes have been active in the last"
    " ten thousand years.",
    # A query.
    "SELECT customers.name, customers.country, SUM(orders.total) AS spent\nFROM customers\n"
    "JOIN orders ON orders.customer_id = customers.id\nWHERE orders.created_at >= '2023-01-01'\n"
    "GROUP BY customers.name, customers.country\nHAVING SUM(orders.total) > 1000\n"
    "ORDER BY spent DESC\nLIMIT 20;",
    # Terms.
    "The tenant pays the rent on the first day of each month. The landlord keeps the roof, the"
    " heating and the pipes in working order. The tenant may keep one cat or one small dog. Both"
    " parties may end this agreement in writing with three months of notice. Damage that was there"
    " before the tenant moved in is listed in appendix B, and the tenant does not pay for it.",
    # A web page.
    '<table class="hours">\n<tr><td>Monday</td><td>9:00 to 17:00</td></tr>\n'
    "<tr><td>Tuesday</td><td>9:00 to 17:00</td></tr>\n<tr><td>Wednesday</td><td>closed</td></tr>\n"
    "<tr><td>Thursday</td><td>12:00 to 20:00</td></tr>\n<tr><td>Friday</td><td>9:00 to 13:00</td>"
    "</tr>\n</table>",
    # A story.
    "When the ferry reached the island, only the lighthouse keeper was waiting on the pier. He"
    " took the mail bag, counted the letters twice, and shook his head. The blue envelope was"
    " missing again. Every autumn for nine years it had come with the last boat, without a sender,"
    " and with a single pressed flower inside. He looked back at the grey water and decided to"
    " write an answer at last.",
    # A settings file.
    "server:\n  host: 127.0.0.1\n  port: 8080\n  workers: 4\ndatabase:\n  url:"
    " postgres://localhost:5432/shop\n  pool_size: 10\n  timeout_seconds: 30\nlogging:\n"
    "  level: info\n  file: /var/log/shop.log\n  rotate: daily",
)

PROSE_TASKS = (
    "Write a short story about {}.",
    "What should one know about {}? Explain it to somebody who has never heard of it.",
    "Write a letter to an old friend in which you talk about {}.",
)
PROSE_SUBJECTS = (
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


def text_prompt(workload: str, index: int) -> str:
    """One of the 36; then they come again."""
    tasks, subjects = (
        (COPY_TASKS, COPY_TEXTS) if workload == "copy" else (PROSE_TASKS, PROSE_SUBJECTS)
    )
    again, place = divmod(index, len(subjects))
    return tasks[(place + again) % len(tasks)].format(subjects[place])


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
