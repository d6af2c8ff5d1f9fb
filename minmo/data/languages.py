"""Languages by their codes: the 102 of Fleurs, and those that other public sets add; names as instructions say them."""

from __future__ import annotations

NAMES = dict(
    entry.split("=")
    for entry in (
        "af=Afrikaans|am=Amharic|ar=Arabic|as=Assamese|ast=Asturian|az=Azerbaijani|be=Belarusian|bg=Bulgarian|"
        "bn=Bengali|bs=Bosnian|ca=Catalan|ceb=Cebuano|ckb=Sorani Kurdish|cs=Czech|cy=Welsh|da=Danish|de=German|"
        "el=Greek|en=English|es=Spanish|et=Estonian|fa=Persian|ff=Fula|fi=Finnish|fil=Filipino|fr=French|ga=Irish|"
        "gl=Galician|gu=Gujarati|ha=Hausa|he=Hebrew|hi=Hindi|hr=Croatian|hu=Hungarian|hy=Armenian|id=Indonesian|"
        "ig=Igbo|is=Icelandic|it=Italian|ja=Japanese|jv=Javanese|ka=Georgian|kam=Kamba|kea=Kabuverdianu|kk=Kazakh|"
        "km=Khmer|kn=Kannada|ko=Korean|ky=Kyrgyz|lb=Luxembourgish|lg=Ganda|ln=Lingala|lo=Lao|lt=Lithuanian|luo=Luo|"
        "lv=Latvian|mi=Maori|mk=Macedonian|ml=Malayalam|mn=Mongolian|mr=Marathi|ms=Malay|mt=Maltese|my=Burmese|"
        "nb=Norwegian|ne=Nepali|nl=Dutch|nso=Northern Sotho|ny=Nyanja|oc=Occitan|om=Oromo|or=Oriya|pa=Punjabi|"
        "pl=Polish|ps=Pashto|pt=Portuguese|ro=Romanian|ru=Russian|sd=Sindhi|sk=Slovak|sl=Slovenian|sn=Shona|"
        "so=Somali|sr=Serbian|sv=Swedish|sw=Swahili|ta=Tamil|te=Telugu|tg=Tajik|th=Thai|tr=Turkish|uk=Ukrainian|"
        "umb=Umbundu|ur=Urdu|uz=Uzbek|vi=Vietnamese|wo=Wolof|xh=Xhosa|yo=Yoruba|yue=Cantonese|zh=Chinese|zu=Zulu"
    ).split("|")
)
"""Code -> English name."""
CHARACTERS = frozenset("zh ja ko yue th lo my km".split())
"""Languages whose errors are counted in characters (CER): the paper's first four, and others written without spaces."""


def name_of(code: str) -> str:
    """The English name of a language. Raises ValueError for a code that is not known here."""
    if code not in NAMES:
        near = f"did you mean {code[:2]}?" if code[:2] in NAMES else f"there are {', '.join(NAMES)}"
        raise ValueError(f"there is no language {code!r}; use a code such as en, zh or yue ({near})")
    return NAMES[code]


def code_of(name: str) -> str | None:
    """The code of a language by its English name; None for a name that is not known here."""
    return next((code for code, known in NAMES.items() if known.lower() == name.strip().lower()), None)
