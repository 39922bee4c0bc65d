"""How LlamaGen cleans a caption before T5 reads it: addresses, HTML, identifiers and odd signs go, blanks are joined.

The rules are those that text-to-image models have taken over from one another since DeepFloyd's IF. Captions of web
pages need them; of written prompts they change little beyond capital letters. They are applied twice, since what one
rule leaves may be what another looks for. Their order and their oddities decide the features, so they are kept:
"epsilon" loses "eps".

Every expression takes time in proportion to the text, where the usual ones take its square: each run of characters is
entered at its beginning alone, and a possessive part (++) is never taken back.
"""

import html
import html.parser
import re
from urllib.parse import unquote_plus

from rear_jax.runtime.extras import needed

VERSION = 1  # of the rules, for fingerprints of features
PASSES = 2
ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"  # of file names
SILENT = {"rt", "rp", "style", "script", "template"}  # HTML elements whose text is not shown
MOST_TAGS = 500  # a text with more < is no caption; the parser takes time in proportion to their number
MOST_JOINTS = 3  # of - and _; a text with more has them for blanks

Rules = tuple[tuple[re.Pattern[str], str], ...]

HOST = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"


def rules(*pairs: tuple[str, str]) -> Rules:
    """Expressions, compiled, with what takes the place of what they match."""
    return tuple((re.compile(expression), new) for expression, new in pairs)


def address(scheme: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Where an address may begin: at a place in a text, and anywhere after a place.

    What is to go is the group `scheme`, with slashes or one more sign, or the group `host`, a name with its path.
    A host begins at the first edge of a word in a run of its characters; there is only one such place in each run.
    """
    begin = rf"\b(?P<scheme>{scheme}:(?:/{{1,3}}|[a-z0-9%]))"
    host = rf"(?>[a-z0-9.\-]*?\b)(?P<host>{HOST})"
    return re.compile(f"{begin}|{host}"), re.compile(rf"{begin}|(?<![a-z0-9.\-]){host}")


ADDRESSES = address("https?"), address("www")
SIGNS = rules(
    (r"@\w+\b", ""),  # names of users
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters, and signs of East Asia
    (
        r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
        r"\uff0d]+",
        "-",
    ),  # dashes
    (r"[`\u00b4«»“”¨]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.(?:{ENDINGS})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"(?<!\s)\s++\.\s++", " "),
)
WORDS = rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # identifiers
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s++)?(?:free\s++)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{ENDINGS})(?:\simages?)?", ""),
    (r"\bpage\s++\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d++[a-zA-Z\d]*+\b", " "),
    (r"\b\d++(?:\.\d*+)?[x\u0445\u00d7]\d++(?:\.(?:\d++\b|\b)|\b)", ""),  # sizes: 30x40
    (r"\b\s++:\s++", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(caption: str) -> str:
    """The caption as T5 gets it; any text is taken."""
    for _ in range(PASSES):
        caption = clean_once(caption)
    return caption


def clean_once(caption: str) -> str:
    """One pass of the rules."""
    text = unquote_plus(caption).strip().lower().replace("<person>", "person")
    for here, anywhere in ADDRESSES:
        text = _without_addresses(text, here, anywhere)
    text = _apply(SIGNS, _without_tags(text))
    if text.count("-") + text.count("_") > MOST_JOINTS:
        text = re.sub("[-_]", " ", text)
    with needed("text"):
        import ftfy
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
    return _apply(WORDS, text).strip()


def _apply(changes: Rules, text: str) -> str:
    for expression, new in changes:
        text = expression.sub(new, text)
    return text


def _without_addresses(text: str, here: re.Pattern[str], anywhere: re.Pattern[str]) -> str:
    """The text without what `address` finds. One may begin right behind another, in the same run of characters."""
    kept, place = [], 0
    while found := here.match(text, place) or anywhere.search(text, place):
        kept.append(text[place : found.start(found.lastgroup)])
        place = found.end()
    return "".join(kept) + text[place:]


def _without_tags(text: str) -> str:
    """The text that HTML shows; the text itself where it breaks the parser."""
    if not ("<" in text or "&" in text) or text.count("<") > MOST_TAGS:
        return text
    reader = _Reader(convert_charrefs=False)
    try:
        reader.feed(text)
        reader.close()
    except AssertionError:  # the parser's word for a broken declaration
        return text
    return "".join(reader.shown)


class _Reader(html.parser.HTMLParser):
    """Collects the text between tags, outside of `SILENT` elements.

    An end tag closes the last element of its name and all within it, and nothing where there is none.
    """

    def __init__(self, *, convert_charrefs: bool):
        super().__init__(convert_charrefs=convert_charrefs)
        self.shown: list[str] = []
        self._open: list[str] = []
        self._silent = 0  # how many of the open elements are

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self._silent += tag in SILENT

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._open:
            return
        last = ""
        while last != tag:
            last = self._open.pop()
            self._silent -= last in SILENT

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.shown.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(_unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html.entities.html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data: str) -> None:
        if data.startswith("cdata["):
            self.shown.append(data.removeprefix("cdata["))


def _unescape(text: str) -> str:
    """Resolves HTML's names of characters; the text stays where one is a number of thousands of digits."""
    try:
        return html.unescape(text)
    except ValueError:
        return text
