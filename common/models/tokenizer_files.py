"""A folder's tokenizer: `tokenizer.json` as it is, and the chat template through transformers.

transformers builds the tokenizers of many model types anew, from the vocabulary alone: the class
decides how text is split, whatever the file says, and the ids may be others than those that the
model was trained on. So the library `tokenizers` reads the file, and it encodes and decodes. The two
are compared on a fixed text, and a line in the log says where they differ.

Of `tokenizer_config.json` count the special tokens that it names, and the chat template. Its
`add_bos_token` and `add_eos_token` do not: what is put around a text is the file's
`post_processor`, and transformers 5 leaves it so too.
"""

import logging
from pathlib import Path
from typing import Any

from common.models.errors import ModelError

logger = logging.getLogger(__name__)

PROBES = (
    "Hello world, it's 12:34 on 2024-01-05; pi = 3.14159, 1 000 000 of 1234567",
    " leading,  two   three    spaces and trailing ",
    "lines\nand\n\nempty ones\r\n\ttabs\t\tand \n spaces",
    "naïve Ångström e\u0301 ﬁ ½ ² １２ Straße İstanbul ΑΣ",
    "Привет мир 你好，世界 こんにちは 한국어 नमस्ते مرحبا שלום ไทย",
    "😀👨‍👩‍👧 🇩🇪 \u200b\ufffd\ufeff",
    'def f(x):\n    return {"a": x[0] != "b"}  # <b>&amp;</b> \\n',
    "▁already ▁▁there Ġx <0x41> UPPER CamelCase don't I'LL",
)


def use_own_sandbox() -> None:
    """The library compiles chat templates in the sandbox of this name, and takes no other."""
    from transformers.utils import chat_template_utils

    from common.models.chat_sandbox import BoundedSandbox

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox


def load_tokenizer(folder: Path) -> tuple[Any, Any]:
    """transformers' tokenizer, for the chat template, and the one of `tokenizers` from the file.

    Raises ModelError.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"trust_remote_code": False, "local_files_only": True}
    path = folder / "tokenizer.json"
    try:
        library = AutoTokenizer.from_pretrained(folder, **options)
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json, the fast tokenizer's file")
        named = library  # the class that reads the file, and adds what the config names
        if type(library) is not PreTrainedTokenizerFast:
            named = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        backend = Tokenizer.from_file(str(path))
        _add_named_tokens(backend, named.added_tokens_decoder, library.all_special_tokens)
        _compare(folder, backend, library)
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{folder} has no usable tokenizer: {reason}") from error
    return library, backend


def _add_named_tokens(backend: Any, named: dict[int, Any], special_texts: list[str]) -> None:
    """Add the tokens that only the config names, and call special what it calls special.

    The file says how its own tokens are matched (the white space they take). named: the config's
    and the file's tokens by their ids. special_texts: what transformers' class calls special; what
    the file does not have is not added for a class.
    """
    from tokenizers import AddedToken

    specials = set(map(str, special_texts))
    own = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted = {token.content: token for _, token in sorted(named.items())}
    for text in specials:
        if text not in wanted and backend.token_to_id(text) is not None:
            wanted[text] = AddedToken(text, normalized=False, special=True)
    for text, token in wanted.items():
        special = token.special or text in specials
        if text not in own:
            token.special = special
            backend.add_tokens([token])
        elif special and not own[text].special:
            own[text].special = True
            backend.add_tokens([own[text]])


def _compare(folder: Path, backend: Any, library: Any) -> None:
    """Say so where transformers' class gives other tokens for a text, or other text for tokens."""
    rebuilt = getattr(library, "backend_tokenizer", None)
    if rebuilt is None:
        return
    for each in (backend, rebuilt):
        each.no_truncation()
        each.no_padding()
    specials = [f"a {text} b{text}\n{text}c" for text in library.all_special_tokens[:8]]
    for probe in (*PROBES, "\n".join(PROBES), *specials):
        ids = backend.encode(probe).ids
        if rebuilt.encode(probe).ids != ids or rebuilt.decode(ids) != backend.decode(ids):
            logger.warning(
                "%s: tokenizer.json and transformers' %s differ, as in the tokens or the text of %r;"
                " those of tokenizer.json are taken",
                folder,
                type(library).__name__,
                probe,
            )
            return
