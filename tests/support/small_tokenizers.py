"""Tokenizers of a few words: one token a word, byte pairs as CLIP's, and one in plain Python without word ids."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

WORDS = "a the cat dog lion red blue apple wearing crown on left right and , sunset".split()  # noqa: SIM905
LENGTH = 16


def with_specials(tokenizer: Tokenizer, length: int = LENGTH) -> PreTrainedTokenizerFast:
    """Begin and end of text around the words; padding is the end of text, as in Stable Diffusion 1.5."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def word_level() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return with_specials(tokenizer)


def byte_pairs(length: int = LENGTH) -> PreTrainedTokenizerFast:
    """CLIP's kind. Short frequent words are one token; "lion" is 2, "crown" 3 and "sunset" 6 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<bos>", "<eos>", "<unk>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    spelling = (
        "c a,ca t</w>,d o,do g</w>,r e,re d</w>,o n</w>,l e,le f,lef t</w>,t h,th e</w>,a n,an d</w>,l i,c r,w n</w>"
    )
    merges = [(left, right) for left, right in (pair.split() for pair in spelling.split(","))]
    vocabulary += [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return with_specials(tokenizer, length)


class SlowTokenizer(PreTrainedTokenizer):
    """In plain Python, without word ids: letters in pairs, apostrophes part of a word."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012  (the name and type that transformers looks for)

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        super().__init__(
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<eos>",
            unk_token="<unk>",
            model_max_length=LENGTH,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.known)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.known)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [word[i : i + 2] for word in text.replace(",", " ,").split() for i in range(0, len(word), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.known.setdefault(token, 1000 + len(self.known))

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, i in self.known.items() if i == index)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *token_ids_0, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2
