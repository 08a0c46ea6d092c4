"""Which option an answer names: by the rules of several sets' owners, and by our own."""

import re
from collections.abc import Mapping

from llamavid_jax.evaluation.items import LETTERS

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


NAMED = r"(?i:\banswer(?: is:?|:))", r"(?i:\b(?:answer|option|choice)(?: is)?:?)"  # before a letter; the first one wins


def chosen(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer names: "B", "(b)", "B. two dogs", "The answer is B", or an option's own words.

    None if it names no option, or several.
    """
    letters, stripped = "".join(options), text.strip()
    bare = _bare(re.sub(rf"^(?i:the )?(?i:correct )?(?:{'|'.join(NAMED)})\s+", "", stripped))
    if not (letters and bare):
        return None
    own = [letter for letter, option in options.items() if _bare(str(option)) == bare]  # some have the same words
    own = own or [letter for letter, option in options.items() if f"{letter.lower()} {_bare(str(option))}" == bare]
    if own and len(bare) > 1:
        return own[0]
    # "A and B", "(A), (C)"; but "B, A dog" is B
    alone = rf"[{letters}](?![\w'])"
    more = rf"\W*(?:(?:/|&|\band\b|\bor\b)\W*{alone}|,\W*{alone}(?!\s+(?!and |or )[a-z]))"
    end = r"[)\]}:,*\"]|\.(?!\w\.)|'(?!\w)|\s*$|\s*\n| - "
    if found := re.match(rf"[(\[{{*\"']*([{letters}{letters.lower()}])(?!{more})(?:{end})", stripped):
        return found[1].upper()
    for words in NAMED:
        if found := re.findall(rf"{words}\s*[(*\"']*([{letters}])\b(?!{more})", stripped):
            return found[0] if len(set(found)) == 1 else None
    if re.search(rf"(?<![\w']){alone}{more}", stripped):
        return None
    # a single capital; "A" and "I" may be words, but not at the end of a clause or before "is correct"
    said = r"[).,:;!?*\"\]]|$| is (?:the )?(?:correct|right|best)\b"
    capitals = rf"(?<![\w'])(?<!not )(?:(?![AI])({alone})|([{letters}])(?={said}))"
    if len(found := {one or other for one, other in re.findall(capitals, stripped)}) == 1:
        return found.pop()
    return own[0] if own else None


def _bare(text: str) -> str:
    """The text in lower case, without quotes or asterisks around it and full stops after it."""
    return text.strip().lstrip("\"'*").rstrip(" .\"'*").lower()


def toolkit(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's rules (2026) for answers that need no judge: a letter, or "Z" for a refusal.

    None where VLMEvalKit would ask a judge.
    """
    return _toolkit_letter(text, options) or _toolkit_words(text, options)


def _toolkit_letter(text: str, options: Mapping[str, str]) -> str | None:
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    found = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", text)
    return found[1].upper() if found and found[1].upper() in options else None


def _toolkit_words(text: str, options: Mapping[str, str]) -> str | None:
    text = text.lower()
    if len(text) > 2 * sum(len(str(option)) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if str(option).lower() in text]
    return named[0] if len(named) == 1 else None


def numbered(options: list[str]) -> dict[str, str]:
    return dict(zip(LETTERS, options, strict=False))
