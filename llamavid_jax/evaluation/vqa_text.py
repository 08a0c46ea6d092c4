"""Normalisation of VQA answers by the two public rules, and the score against ten people's answers.

`official` is the VQA server's rule.  `for_upload` is the rule (of M4C and TextVQA) that the original applies before an
upload: it also removes ',' and '?' and splits possessives ("bob 's").
"""

import re
from collections.abc import Sequence

NAMES = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NAMES.split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MOST_STOPS = 32  # full stops to remove; the public tools pass a flag of that value in place of a count

# Missing apostrophes are restored: each of these words, with any one of its apostrophes left out, becomes the word.
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
CONTRACTIONS["somebody'd"] = "somebodyd"  # as in the public tools


def official(text: str) -> str:
    """The VQA server's rule: punctuation, then numbers, articles and contractions."""
    return _words(_without_punctuation(one_line(text)))


def for_upload(text: str) -> str:
    """The rule of the original's converters."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official(text)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Removes each mark that has a space beside it anywhere, or any mark if a comma stands between digits.

    Other marks become spaces.  Full stops are removed unless a digit follows.
    """
    glued, out = re.search(r"\d,\d", text) is not None, text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if glued or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=MOST_STOPS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, people: Sequence[str]) -> float:
    """The mean over the people of min(1, number of the other people who gave this answer / 3)."""
    same = [person == answer for person in people]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(people)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The official tool's accuracy; answers are normalised only if the people's answers differ."""
    answer, people = one_line(answer), [one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, people = official(answer), [official(person) for person in people]
    return agreement(answer, people)


def textvqa_scores(people: Sequence[str]) -> dict[str, float]:
    """TextVQA's score of every normalised answer that somebody gave."""
    people = [for_upload(person) for person in people]
    return {answer: agreement(answer, people) for answer in sorted(set(people))}
