"""Number words 0..100 in the five languages of the nano domain: what is said, counted and translated there."""

from __future__ import annotations

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
"""Language codes and their English names, as used in translation instructions."""

_UNITS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
    "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis "
    "veintisiete veintiocho veintinueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
    "dix-huit dix-neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici "
    "sedici diciassette diciotto diciannove",
    "ru": "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать "
    "четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать",
}
_TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "es": "veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa",
    "fr": "vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt",
    "it": "venti trenta quaranta cinquanta sessanta settanta ottanta novanta",
    "ru": "двадцать тридцать сорок пятьдесят шестьдесят семьдесят восемьдесят девяносто",
}
_HUNDRED = {"en": "one hundred", "es": "cien", "fr": "cent", "it": "cento", "ru": "сто"}


def number_words(n: int, language: str = "en") -> str:
    """How n (0..100) is said, in lower case, without hyphens in English. Raises ValueError outside that range."""
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} has no number words here: use one of {', '.join(LANGUAGES)}")
    if not 0 <= n <= 100:
        raise ValueError(f"number words reach from 0 to 100, got {n}")
    units = _UNITS[language].split()
    if n == 100:
        return _HUNDRED[language]
    if n < len(units):
        return units[n]
    tens, unit = _TENS[language].split()[n // 10 - 2], n % 10
    if language == "fr":
        return _french(n, tens, units)
    if unit == 0:
        return tens
    if language == "it":
        stem = tens[:-1] if unit in (1, 8) else tens
        return stem + ("tré" if unit == 3 else units[unit])
    return f"{tens} y {units[unit]}" if language == "es" else f"{tens} {units[unit]}"


def _french(n: int, tens: str, units: list[str]) -> str:
    """Seventy and ninety count on from sixty and eighty: the rest is up to nineteen there, up to nine elsewhere."""
    rest = n % 20 if n >= 60 else n % 10
    if rest == 0:
        return "quatre-vingts" if n == 80 else tens
    joint = " et " if rest in (1, 11) and n < 80 else "-"
    return f"{tens}{joint}{units[rest]}"


def spoken_words(text: str) -> list[str]:
    """The words of a text as they are said: hyphens part words too ("quatre-vingt-dix" is three)."""
    return text.replace("-", " ").split()
