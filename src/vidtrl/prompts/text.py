"""Pure functions on text: what a language model's answer is worth as a prompt, and what it must not lose."""

import re
import unicodedata


REFUSAL = re.compile(
    r"(?i)^\W*(?:i(?:'|’)?m (?:very |so |really )?sorry|sorry\b|i (?:can(?:'|’)?t|can ?not|won(?:'|’)?t|am unable|am not able)\b"
    r"|i(?:'|’)m (?:unable|not able)\b|unfortunately\b|as an? (?:ai|language model|assistant)\b)|^\W*(?:抱歉|对不起|很抱歉|我无法|我不能)"
)
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|here(?:'s| is| are))\b[^\n:]{0,80}:\s*"
    r"|(?:(?:the|an?|enhanced|improved|rewritten|revised|expanded|final|video)\s+)*(?:prompt|description|caption|output)\s*:\s*)",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"^\s*(?:#{1,6}\s+|[-*•]\s+|>\s+|```\w*)|\*\*|__|```", re.MULTILINE)
_QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」|‘([^’]+)’(?!\w)|(?<!\w)\'([^\']+)\'(?!\w)',
)
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,:/]\d+)*")
_SPELLED = dict(
    zip("two three four five six seven eight nine ten eleven twelve".split(), map(str, range(2, 13)), strict=True)
)
_WIDE = r"぀-ヿ㐀-鿿豈-﫿가-힯"  # scripts without spaces between words (kana, han, hangul)
_WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}](?:[^\s{_WIDE}]*[^\W{_WIDE}])?")
_SENTENCE_END = re.compile(r"[.!?…](?=\s|$)|[。！？]")
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "「": "」"}


def count_words(text: str) -> int:
    """Words of a text; in scripts without spaces every character is one."""
    return len(_WORD.findall(text))


def required_words(prompt: str) -> list[str]:
    """
    What a rewritten prompt has to keep: text in quotation marks, and numbers in digits or, from two to twelve, in words.

    ```python
    >>> required_words('Three neon signs that say "OPEN 24h", shot at 35 mm')
    ['OPEN 24h', 'Three', '35']
    ```
    """
    quoted = [" ".join("".join(groups).split()) for groups in _QUOTED.findall(prompt)]
    rest = _QUOTED.sub(" ", prompt)
    numbers = [(m.start(), m.group()) for m in _NUMBER.finditer(rest)]
    numbers += [(m.start(), m.group()) for m in re.finditer(r"[A-Za-z]+", rest) if m.group().lower() in _SPELLED]
    return list(dict.fromkeys([q for q in quoted if q] + [n for _, n in sorted(numbers)]))


def missing_words(prompt: str, text: str, words: list[str] | None = None) -> list[str]:
    """
    What `text` has lost of what it has to keep.

    Quoted text is kept if it stands there letter by letter (runs of white space are one space), a number if it stands
    there as a whole, in digits or spelled out, and any other word without regard to case.

    Args:
        prompt (`str`): What the user wrote; see [`required_words`].
        text (`str`): The rewritten prompt.
        words (`list[str]`, *optional*): Further words or phrases that have to be kept.

    Returns:
        `list[str]`: In the order of the prompt. Empty if nothing is lost.
    """
    flat = " ".join(text.split())
    found = {_SPELLED.get(w.lower(), w) for w in re.findall(r"[A-Za-z]+", flat)} | set(_NUMBER.findall(flat))
    quoted = {" ".join("".join(groups).split()) for groups in _QUOTED.findall(prompt)}

    def kept(word):
        if word in quoted:
            return word in flat
        return _SPELLED.get(word.lower(), word) in found

    lost = [word for word in required_words(prompt) if not kept(word)]
    extra = [" ".join(word.split()) for word in words or []]
    return lost + [w for w in extra if not re.search(rf"(?i)(?<!\w){re.escape(w)}(?!\w)", flat)]


def clean_output(text: str, max_words: int | None = None) -> str:
    """
    A language model's answer without what does not belong into a prompt.

    Thoughts (`<think>`), code fences, Markdown, introductions ("Sure, here is the prompt:"), quotation marks around the
    whole, and control and invisible characters are removed; white space becomes single spaces. An answer of more than
    `max_words` words ends with its last whole sentence, or else clause, or else word within the limit.

    Args:
        text (`str`): As generated.
        max_words (`int`, *optional*): In scripts without spaces every character counts.

    Returns:
        `str`: Possibly empty.
    """
    text = unicodedata.normalize("NFC", _THINKING.sub(" ", text))
    text = "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "" for c in text)
    text = _MARKUP.sub("", text).strip()
    while (shorter := _PREAMBLE.sub("", text, count=1).strip()) != text:
        text = shorter
    text = " ".join(text.split())
    # the last quotation mark closes the first one only if there is none in between
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
        text = text[1:-1].strip()
    if max_words is not None and count_words(text) > max_words:
        text = text[: list(_WORD.finditer(text))[max_words].start()].rstrip()
        sentences = [m.end() for m in _SENTENCE_END.finditer(text)]
        clause = max(text.rfind(c) for c in ",;，；")
        text = text[: sentences[-1]] if sentences else text[:clause] if clause > 0 else text
    return text.strip()


def find_problem(
    prompt: str, text: str, min_words: int = 1, language: str | None = None, words: list[str] | None = None
) -> str | None:
    """
    Why a cleaned answer cannot take the place of the user's prompt.

    Args:
        prompt (`str`): What the user wrote.
        text (`str`): The answer, from [`clean_output`].
        min_words (`int`, *optional*, defaults to `1`): Fewer words are no prompt.
        language (`str`, *optional*): `"English"` and `"Chinese"` are checked by their script, others are not.
        words (`list[str]`, *optional*): Further words that have to be kept.

    Returns:
        `str` or `None`: The reason, or `None` for a valid prompt.
    """
    if not text:
        return "the answer is empty"
    if REFUSAL.search(text) and not REFUSAL.search(prompt):
        return "the model refused"
    if count_words(text) < min_words:
        return f"the answer has {count_words(text)} words, fewer than {min_words}"
    if repeats_itself(text):
        return "the answer repeats itself"
    if lost := missing_words(prompt, text, words):
        return f"the answer lost {', '.join(map(repr, lost))}"
    if language is not None and not _written_in(text, language):
        return f"the answer is not in {language}"
    return None


def repeats_itself(text: str) -> bool:
    """Whether a run of one to eight words stands there four times in a row: a model that got stuck."""
    words = [w.lower() for w in _WORD.findall(text)]
    for n in range(1, 9):
        run = 0
        for i in range(len(words) - n):
            run = run + 1 if words[i] == words[i + n] else 0
            if run >= 3 * n:
                return True
    return False


def _written_in(text: str, language: str) -> bool:
    letters = [c for c in _QUOTED.sub(" ", text) if c.isalpha()]
    wide = sum(bool(re.match(f"[{_WIDE}]", c)) for c in letters)
    latin = sum("LATIN" in unicodedata.name(c, "") for c in letters)
    if language.lower() in ("english", "en"):
        return latin >= 0.5 * len(letters)
    if language.lower() in ("chinese", "zh", "中文"):
        return wide >= 0.3 * len(letters)
    return True
