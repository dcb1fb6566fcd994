"""Special-token text in chat messages, over tokenizers and templates of several shapes.

The law: take the same chat with a harmless word of the same length in the place of that text. The
tokens outside are the same, and inside are those of the text's characters. Vocabularies of single
characters make it exact: a token is a character, or one of the template's own special tokens.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from common.models.tokenizer import Tokenizer
from common.testing.threads import longest_wait

CHARACTERS = [chr(code) for code in range(0x20, 0x7F)] + ["\n", "▁", "é", "你", "ꀀ"]
SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|e|>", "[A]", "[A]b")
FILLER = "q"  # in no special text, in no template, in no message


def characters(extra: tuple[str, ...] = SPECIALS) -> dict[str, int]:
    return {text: id for id, text in enumerate([*extra, *CHARACTERS])}


def bpe(**options: Any) -> Backend:
    return Backend(models.BPE(characters(), [], unk_token="<unk>", **options))


def byte_level(add_prefix_space: bool, **options: Any) -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: id for id, text in enumerate([*SPECIALS, *alphabet])}
    backend = Backend(models.BPE(vocabulary, [], **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def metaspace(scheme: str, split: bool) -> Backend:
    backend = bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split)
    backend.decoder = decoders.Metaspace("▁", scheme, split)
    return backend


def prepending() -> Backend:
    """As Llama 2 has it: a space before each piece between special tokens."""
    backend = bpe(fuse_unk=True)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def unigram() -> Backend:
    """Its vocabulary has the special texts as pieces, which the model finds in any text."""
    pieces = [(text, 0.0) for text in SPECIALS] + [(text, -5.0) for text in CHARACTERS]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    return backend


def isolated() -> Backend:
    """Words as the vocabulary has them, so that `<s>` is one (Llama 3's ignore_merges)."""
    backend = bpe(ignore_merges=True)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|<[^>]*>|\w"), "isolated")
    return backend


SHAPES: dict[str, Callable[[], Backend]] = {
    "byte level": lambda: byte_level(False),
    "byte level with a prefix space": lambda: byte_level(True),
    "first": lambda: metaspace("first", False),
    "first, split": lambda: metaspace("first", True),
    "always": lambda: metaspace("always", True),
    "never": lambda: metaspace("never", False),
    "prepend": prepending,
    "unigram": unigram,
    "ignore_merges": isolated,
}
FLAGS: dict[str, dict[str, bool]] = {
    "none": {},
    "rstrip": {"rstrip": True},
    "lstrip": {"lstrip": True},
    "both": {"lstrip": True, "rstrip": True},
    "normalized": {"normalized": True},
}
TEMPLATES = {
    "chatml": "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}",
    "plain": "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}<|end|>",
    "trimmed": "{% for m in messages %}{{ '[A] ' ~ m['content'] | trim ~ ' ' }}</s>{% endfor %}",
    "cut": "{{ bos_token }}{% for m in messages %}{{ m.content[2:9] }}<|e|>{% endfor %}",
    "changed case": "{% for m in messages %}{{ m.content | upper }} <|e|>{{ m.content.lower() }}"
    "<|end|>{% endfor %}",
    "joined": "{{ messages | map(attribute='content') | join('<|end|>') ~ eos_token }}",
    "built": "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% set ns = namespace(t='') %}"
    "{% for line in m.content.split('\n') %}{% set ns.t = ns.t ~ line ~ '<|e|>' %}{% endfor %}"
    "{{ ns.t }}{% endfor %}",
    "macros": "{% macro turn(t) %}<s>{{ t }}{{ caller() if caller }}</s>{% endmacro %}"
    "{% for m in messages %}{% call turn(m.content.strip()) %}[A]{% endcall %}{% endfor %}",
    "formatted": "{% for m in messages %}{{ '<|user|>%s<|end|>' % m.content }}"
    "{{ '{}</s>'.format(m.content) }}{{ m.content | indent(2) }}{% endfor %}",
    "replaced": "{% for m in messages %}{{ 'X<|end|>' | replace('X', m.content) }}{% endfor %}",
    "reversed": "{% for m in messages | reverse %}{{ m.content[::-1] }}</s>{% endfor %}",
    "letters": "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}<|end|>"
    "{% endfor %}",
    "an object": "{{ messages | tojson }}<|end|>",
}


@functools.cache
def tokenizer_of(shape: str, flags: str = "none", template: str = "chatml") -> Tokenizer:
    backend = SHAPES[shape]()
    options = {"normalized": False, **FLAGS[flags]}
    # The text of a normalized token is looked for where a piece begins, by the Prepend normalizer.
    backend.add_special_tokens([AddedToken(text, **options) for text in SPECIALS])
    library = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    library.chat_template = TEMPLATES.get(template, template)
    return Tokenizer(library, backend)


def messages_of(contents: list[str]) -> list[dict[str, str]]:
    roles = ["user", "system", "user", "system"]
    return [{"role": r, "content": t} for r, t in zip(roles, contents, strict=False)]


def plain_render(template: str, messages: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    compiled = environment.from_string(TEMPLATES.get(template, template))
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return compiled.render(messages=messages, **values)


def harmless(content: str) -> str:
    """Special text, whole or in parts at the borders of a message, replaced by a word."""
    pattern = "|".join(map(re.escape, sorted(SPECIALS, key=len, reverse=True)))
    content = re.sub(pattern, lambda m: FILLER * len(m[0]), content)
    return re.sub(r"[<>|\[\]]", FILLER, content)


def check_law(tokenizer: Tokenizer, template: str, contents: list[str]) -> None:
    real, words = messages_of(contents), messages_of([harmless(text) for text in contents])
    ids = tokenizer.encode_chat(real)
    expected = tokenizer._backend.encode(plain_render(template, words), add_special_tokens=False)
    assert len(ids) == len(expected.ids), (ids, expected.tokens)
    text = plain_render(template, real)
    name_of = tokenizer._backend.id_to_token
    for place, (start, _) in enumerate(expected.offsets):
        if expected.tokens[place] in (FILLER, FILLER.upper()):
            assert name_of(ids[place]) == text[start], (place, contents)
        else:
            assert ids[place] == expected.ids[place], (place, contents, ids, expected.tokens)


WORD = st.sampled_from(
    [*SPECIALS, "<|", "|>", "user", "end|>", "<|EN", "D|>", "[", "A]", "b", " ", "  ", "\n", "a"]
)
CONTENTS = st.lists(st.lists(WORD, max_size=7).map("".join), min_size=1, max_size=4)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40)
@given(contents=CONTENTS, flags=st.sampled_from(list(FLAGS)), data=st.data())
def test_the_tokens_around_are_those_of_a_harmless_chat(
    shape: str, contents: list[str], flags: str, data: st.DataObject
) -> None:
    names = [name for name in TEMPLATES if name not in ("an object", "formatted")]
    template = data.draw(st.sampled_from(names))
    check_law(tokenizer_of(shape, flags, template), template, contents)


@settings(max_examples=60)
@given(contents=CONTENTS)
def test_a_template_that_formats(contents: list[str]) -> None:
    """Marks are lost in `%`, and found again by a second rendering."""
    for template in ("formatted", "an object"):
        check_law(tokenizer_of("byte level", "none", template), template, contents)


def shown(tokenizer: Tokenizer, contents: list[str], **options: bool) -> list[str]:
    messages = messages_of(contents)
    return [tokenizer._backend.id_to_token(id) for id in tokenizer.encode_chat(messages, **options)]


def own_specials(tokenizer: Tokenizer, contents: list[str]) -> list[str]:
    """The special tokens of a chat; characters without a token are none."""
    return [text for text in shown(tokenizer, contents) if text in SPECIALS]


class TestWhatATemplateMakesOfIt:
    """Text that becomes that of a special token only in the template, or with its help."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(
        ("template", "content"),
        [
            ("{{ messages[0].content | lower }}", "<|END|> </S>"),
            ("{{ messages[0].content | replace('~', '') }}", "<|e~nd|> <~s>"),
            ("{{ messages[0].content[::-1] }}", ">s< >|dne|<"),
            ("{{ messages[0].content.split('/') | join }}", "<|e/nd|>/<s>"),
            ("{{ '<|' ~ messages[0].content }}", "end|>"),
            ("{{ messages[0].content }}|>", "<|end"),
            ("<|{{ messages[0].content }}|>", "end"),
            ("{{ '%s|>' % messages[0].content }}", "<|end"),
            ("{{ '<|e{}'.format(messages[0].content) }}", "nd|>"),
            ("{{ messages[0].content | title | lower }}", "<|end|> <s>"),
            ("{{ messages[0].content | tojson }}", "<|end|>"),
            ("{{ messages[0].content | safe }}", "<|end|>"),
            ("{{ messages[0].content | list | join }}", "<|end|>"),
            ("{{ messages[0].content | wordwrap(60) }}", "<|end|> </s>"),
            ("{% filter trim %}{{ messages[0].content }}{% endfilter %}", " <|end|>"),
            ("{{ messages[0].content ~ messages[0].role }}", "<s><|"),
            ("{{ messages | map(attribute='content') | join }}", "<|end|>"),
            ("{{ {'a': messages[0].content}['a'] }}", "<s>"),
            ("{{ messages[0]['content'].encode().decode() }}", "<s>"),
            ("{{ messages[0].content.translate({'~': ''}) }}", "<s>"),
        ],
    )
    def test_stays_text(self, shape: str, template: str, content: str) -> None:
        tokenizer = tokenizer_of(shape, "none", template)
        assert own_specials(tokenizer, [content]) == []
        both = tokenizer_of(shape, "none", f"<s>{template}<|e|>")
        assert own_specials(both, [content]) == ["<s>", "<|e|>"]

    def test_a_normalizer_makes_none(self) -> None:
        """NFKC makes `<s>` of full width letters, which Unigram has as a piece."""
        tokenizer = tokenizer_of("unigram", "none", "<s>{{ messages[0].content }}</s>")
        assert own_specials(tokenizer, ["＜s＞ ＜/s＞ a"]) == ["<s>", "</s>"]

    def test_a_template_sees_the_users_text(self) -> None:
        template = (
            "{% for m in messages %}{% if '<|end|>' in m.content %}{{ m.content | length }}"
            "{% elif m.content.startswith('<s>') %}{{ m.content.split('<s>')[1] }}"
            "{% else %}{{ m.content | replace('</s>', '-') }}{% endif %}<|e|>{% endfor %}"
        )
        tokenizer = tokenizer_of("never", "none", template)
        tokens = shown(tokenizer, ["a<|end|>", "<s>b", "c</s>d"])
        assert "".join(tokens) == "8<|e|>b<|e|>c-d<|e|>"
        assert tokens.count("<|e|>") == 3

    def test_own_tokens_in_lists_and_choices(self) -> None:
        template = (
            "{% set names = {'user': '<|user|>', 'system': ['<s>', ('[A]b', 1)]} %}"
            "{% for m in messages %}{{ names[m.role] if m.role == 'user' else"
            " names[m.role][0] ~ names['system'][1][0] }}{{ m.content }}{% endfor %}"
            "{{ '<|e|>' * 2 }}{{ ['<|', 'end|>'] | join | trim }}{{ '</S>' | lower }}"
        )
        tokens = shown(tokenizer_of("never", "none", template), ["<s>", "[A]"])
        own = ["<|e|>", "<|e|>", "<|end|>", "</s>"]
        assert tokens == ["<|user|>", *"<s>", "<s>", "[A]b", *"[A]", *own]

    def test_of_overlapping_texts_the_templates_own_stays(self) -> None:
        """`[A]b` is a token too, but its last character is the user's."""
        template = "{% for m in messages %}[A]{{ m.content }}{% endfor %}"
        tokens = shown(tokenizer_of("never", "none", template), ["b", "a"])
        assert tokens == ["[A]", "b", "[A]", "a"]
        tokens = shown(tokenizer_of("never", "none", template), ["b<s>", "[A]b"])
        assert tokens == ["[A]", "b", *"<s>", "[A]", *"[A]b"]

    def test_a_token_that_wants_a_word_of_its_own(self) -> None:
        """What the library leaves as text for a harmless chat is text here too."""
        backend = metaspace("never", False)
        flags: dict[str, Any] = {"normalized": False}
        backend.add_special_tokens([AddedToken("<s>", single_word=True, **flags)])
        backend.add_special_tokens([AddedToken("<|e|>", **flags)])
        library = PreTrainedTokenizerFast(tokenizer_object=backend)
        library.chat_template = "<s> a<s>b <s><|e|>{{ messages[0].content }}"
        tokens = shown(Tokenizer(library), ["<|e|>"])
        assert tokens == ["<s>", "▁", "a", *"<s>", "b", "▁", "<s>", "<|e|>", *"<|e|>"]

    def test_characters_without_a_token_change_nothing(self) -> None:
        """`<unk>` stands for them; a user's `<unk>` is text, and the template's is a token."""
        tokenizer = tokenizer_of("never", "none", "<unk>{{ messages[0].content }}<|e|>")
        assert shown(tokenizer, ["ж<unk>ж"]) == ["<unk>", "<unk>", *"<unk>", "<unk>", "<|e|>"]

    def test_many_special_tokens(self) -> None:
        backend = metaspace("never", False)
        texts = [f"<|r{number}|>" for number in range(3000)]
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in texts])
        library = PreTrainedTokenizerFast(tokenizer_object=backend)
        library.chat_template = "<|r7|>{{ messages[0].content }}<|r2999|>"
        content = "".join(texts[::10])
        tokens = shown(Tokenizer(library), [content])
        assert tokens == ["<|r7|>", *content, "<|r2999|>"]


class TestContinuing:
    def continued(self, template: str, contents: list[str], shape: str = "never") -> str:
        tokenizer = tokenizer_of(shape, "none", template)
        options = {"add_generation_prompt": False, "continue_final_message": True}
        return "".join(shown(tokenizer, contents, **options))

    @pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "an object"])
    @pytest.mark.parametrize("contents", [["a", "b c"], ["x  y ", "1, 2 "], ["<s>", "<|end|> 3"]])
    def test_as_transformers(self, template: str, contents: list[str]) -> None:
        tokenizer = tokenizer_of("byte level", "none", template)
        messages, library = messages_of(contents), tokenizer._tokenizer
        options = {"add_generation_prompt": False, "continue_final_message": True}
        try:
            text = library.apply_chat_template(messages, tokenize=False, **options)
        except ValueError:
            with pytest.raises(ValueError, match=r"^continue_final_message: "):
                tokenizer.encode_chat(messages, **options)
        else:
            ids = tokenizer.encode_chat(messages, **options)
            shown = [tokenizer.token_text(id) for id in ids]
            assert "".join(shown) == text

    def test_ends_behind_the_text(self) -> None:
        begin = "<|user|>user\na<|end|>\n<|user|>system\nb"
        assert self.continued("chatml", ["a", "b"]).replace("▁", " ") == begin
        assert self.continued("chatml", ["a", "b "]).replace("▁", " ") == begin + " "
        assert self.continued("chatml", ["a", ""]).replace("▁", " ") == begin[:-1]
        trimming = "{% for m in messages %}[A] {{ m.content | trim }}</s>{% endfor %}"
        assert self.continued(trimming, ["a", "b "]) == "[A]▁a</s>[A]▁b"

    def test_special_text_in_it_is_inert(self) -> None:
        tokenizer = tokenizer_of("never", "rstrip", "chatml")
        options = {"add_generation_prompt": False, "continue_final_message": True}
        tokens = shown(tokenizer, ["<s>", "a<|end|>b"], **options)
        assert [text for text in tokens if text in SPECIALS] == ["<|user|>", "<|end|>", "<|user|>"]
        assert tokens[-9:] == [*"a<|end|>b"]

    @pytest.mark.parametrize(
        "template",
        [
            "{{ messages[0].content }}",
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
            "<|end|>",
        ],
    )
    def test_a_template_that_drops_the_text(self, template: str) -> None:
        with pytest.raises(
            ValueError, match=r"^continue_final_message: the chat template"
        ) as error:
            self.continued(template, ["first", "last one"])
        assert "\n" not in str(error.value)

    def test_both_are_refused(self) -> None:
        tokenizer = tokenizer_of("never")
        with pytest.raises(ValueError, match="add_generation_prompt and continue_final_message"):
            tokenizer.encode_chat(messages_of(["a"]), True, True)
        with pytest.raises(ValueError, match="add_generation_prompt and continue_final_message"):
            tokenizer.encode_chat(messages_of(["a"]), continue_final_message=True)

    def test_without_an_opening(self) -> None:
        tokenizer = tokenizer_of("never")
        with_it, without = (
            "".join(shown(tokenizer, ["a"], add_generation_prompt=add)) for add in (True, False)
        )
        assert without == "<|user|>user\na<|end|>\n"
        assert with_it == without + "<|user|>assistant\n"


def test_thousands_of_special_texts_leave_others_their_turn() -> None:
    tokenizer = tokenizer_of("byte level")
    messages = messages_of(["word <|end|> </s> " * 12_000] * 2)
    share = min(longest_wait(lambda: tokenizer.encode_chat(messages)) for _ in range(3))
    assert share < 0.5, share
    ids = tokenizer.encode_chat(messages)
    texts = {id: text for id, text in tokenizer.special_ids.items() if id in ids}
    assert sorted(texts.values()) == ["<|end|>", "<|user|>"]
