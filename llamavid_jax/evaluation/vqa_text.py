"""Answers of VQA-like sets, made comparable: the two public normalisations, and the score among ten people.

`official` is the VQA server's; `for_upload` is what the original's converters do to an answer before it is uploaded
(that of M4C and TextVQA): it also takes ',' and '?' away and splits possessives ("bob 's").
"""

import re
from collections.abc import Sequence

NAMES = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NAMES.split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MOST_STOPS = 32  # full stops that are taken away; the public tools pass a flag of that value where a count belongs

# An apostrophe that was left out is put back: each of these words without any one of its apostrophes means the word.
APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # as the tools have it


def official(text: str) -> str:
    """The VQA server's: punctuation, then numbers, articles and contractions."""
    return _words(_without_punctuation(one_line(text)))


def for_upload(text: str) -> str:
    """The original converters'."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official(text)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark goes where a blank stands beside it anywhere, or digits on both sides of a comma; else it is a blank."""
    glued, out = re.search(r"\d,\d", text) is not None, text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if glued or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=MOST_STOPS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, people: Sequence[str]) -> float:
    """The mean over the people of min(1, how many of the others gave this answer / 3)."""
    same = [person == answer for person in people]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(people)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The official tool's: answers are normalised where the people's differ, else compared as they are."""
    answer, people = one_line(answer), [one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, people = official(answer), [official(person) for person in people]
    return agreement(answer, people)


def textvqa_scores(people: Sequence[str]) -> dict[str, float]:
    """TextVQA's score of every answer that somebody gave, normalised."""
    people = [for_upload(person) for person in people]
    return {answer: agreement(answer, people) for answer in sorted(set(people))}
