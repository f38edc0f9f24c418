"""Vocabulary of a tiny teacher's tokenizer: every word of its captions is one token."""

import string
from collections.abc import Iterable

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_pairs(sentences: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a CLIP tokenizer's vocabulary and merges in which each word of `sentences` is one token.

    Other words of the letters a to z are spelt in letters.
    """
    words = sorted({word for sentence in sentences for word in sentence.split()})
    tokens = [START, END]
    tokens += [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    merges = []
    for word in words:
        # From the end of the word: a pair that ends a word occurs only where that word ends.
        suffix = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges.append((letter, suffix))
            suffix = letter + suffix
            tokens.append(suffix)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return vocabulary, list(dict.fromkeys(merges))
