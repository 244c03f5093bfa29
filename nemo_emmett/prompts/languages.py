"""Language codes: ISO 639-1 as Whisper lists them, M2M100's, and FLORES-200's as NLLB writes them.

The tables are those of the tokenizers in transformers: a code is valid if one of the backbones has it. The code of a
language in a family of backbones: :func:`m2m100_code`, :func:`flores_code` (NLLB) and :func:`mbart_code`.
"""

from __future__ import annotations

import re
from functools import cache

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError

_WITH_SUBTAGS = re.compile(r"(?P<code>[a-z]{2,3})(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?")
"""A language code with a script, a region or both, as BCP 47 writes them: zh-Hant, pt-BR, es-419, zh-Hant-TW."""

_ISO_AND_FLORES = """
    af:afr_Latn ak:aka_Latn am:amh_Ethi ar:arb_Arab as:asm_Beng ay:ayr_Latn az:azj_Latn ba:bak_Cyrl be:bel_Cyrl
    bg:bul_Cyrl bm:bam_Latn bn:ben_Beng bo:bod_Tibt bs:bos_Latn ca:cat_Latn cs:ces_Latn cy:cym_Latn da:dan_Latn
    de:deu_Latn dz:dzo_Tibt ee:ewe_Latn el:ell_Grek en:eng_Latn eo:epo_Latn es:spa_Latn et:est_Latn eu:eus_Latn
    fa:pes_Arab ff:fuv_Latn fi:fin_Latn fj:fij_Latn fo:fao_Latn fr:fra_Latn ga:gle_Latn gd:gla_Latn gl:glg_Latn
    gn:grn_Latn gu:guj_Gujr ha:hau_Latn he:heb_Hebr hi:hin_Deva hr:hrv_Latn ht:hat_Latn hu:hun_Latn hy:hye_Armn
    id:ind_Latn ig:ibo_Latn is:isl_Latn it:ita_Latn ja:jpn_Jpan jv:jav_Latn ka:kat_Geor kg:kon_Latn ki:kik_Latn
    kk:kaz_Cyrl km:khm_Khmr kn:kan_Knda ko:kor_Hang kr:knc_Latn ks:kas_Arab ku:kmr_Latn ky:kir_Cyrl lb:ltz_Latn
    lg:lug_Latn li:lim_Latn ln:lin_Latn lo:lao_Laoo lt:lit_Latn lv:lvs_Latn mg:plt_Latn mi:mri_Latn mk:mkd_Cyrl
    ml:mal_Mlym mn:khk_Cyrl mr:mar_Deva ms:zsm_Latn mt:mlt_Latn my:mya_Mymr nb:nob_Latn ne:npi_Deva nl:nld_Latn
    nn:nno_Latn no:nob_Latn ny:nya_Latn oc:oci_Latn om:gaz_Latn or:ory_Orya pa:pan_Guru pl:pol_Latn ps:pbt_Arab
    pt:por_Latn qu:quy_Latn rn:run_Latn ro:ron_Latn ru:rus_Cyrl rw:kin_Latn sa:san_Deva sc:srd_Latn sd:snd_Arab
    sg:sag_Latn si:sin_Sinh sk:slk_Latn sl:slv_Latn sm:smo_Latn sn:sna_Latn so:som_Latn sq:als_Latn sr:srp_Cyrl
    ss:ssw_Latn st:sot_Latn su:sun_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu tg:tgk_Cyrl th:tha_Thai
    ti:tir_Ethi tk:tuk_Latn tl:tgl_Latn tn:tsn_Latn tr:tur_Latn ts:tso_Latn tt:tat_Cyrl tw:twi_Latn ug:uig_Arab
    uk:ukr_Cyrl ur:urd_Arab uz:uzn_Latn vi:vie_Latn wo:wol_Latn xh:xho_Latn yi:ydd_Hebr yo:yor_Latn zh:zho_Hans
    zu:zul_Latn
"""
_FLORES_OF_ISO = dict(pair.split(":") for pair in _ISO_AND_FLORES.split())
"""The FLORES-200 code of each ISO 639-1 language that NLLB has; of a macrolanguage, its standard (ar: Modern Standard
Arabic; no: Bokmål), and of a language with several scripts the one it is mostly written in."""

_ALIASES = {"jw": "jv", "ns": "nso"}
"""Codes that are not ISO 639: Whisper's of Javanese and M2M100's of Northern Sotho."""

_TRADITIONAL_CHINESE = ("TW", "HK", "MO")  # regions that write Chinese in the traditional script

_NAMES = {
    "bn": "Bengali",
    "ff": "Fulah",
    "jw": "Javanese",
    "mi": "Maori",
    "my": "Myanmar",
    "nn": "Nynorsk",
    "ns": "Northern Sotho",
}
"""English names other than Babel's: Whisper's, which stay, since models were trained on prompts with them."""


@cache
def _names() -> dict[str, str]:
    from babel import Locale

    return dict(Locale("en").languages) | _NAMES


@cache
def _m2m100_codes() -> frozenset[str]:
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    return frozenset(FAIRSEQ_LANGUAGE_CODES["m2m100"])


@cache
def _flores_codes() -> frozenset[str]:
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    return frozenset(FAIRSEQ_LANGUAGE_CODES)


@cache
def _mbart_codes() -> dict[str, str]:
    """``de: de_DE``; mBART-50's, among which are all of mBART's."""
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES

    return {code.split("_")[0]: code for code in FAIRSEQ_LANGUAGE_CODES}


@cache
def known_languages() -> frozenset[str]:
    """All language codes that a recipe may name: ``de``, ``ast``, ``deu_Latn``, ..."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return frozenset(LANGUAGES) | frozenset(_FLORES_OF_ISO) | _m2m100_codes() | _flores_codes()


def is_iso_code(code: str) -> bool:
    """Whether ``code`` is a language code of two letters that a recipe may name; no table of transformers is read."""
    return code in _FLORES_OF_ISO


def is_known_language(code: str) -> bool:
    """Whether ``code`` is a language code that a recipe may name; script and region may follow: ``zh-Hant``, ``en-US``.

    Example:
        >>> is_known_language("pt-BR"), is_known_language("en-de")
        (True, False)
    """
    if code in _FLORES_OF_ISO or code in known_languages():  # the latter imports transformers
        return True
    tagged = _WITH_SUBTAGS.fullmatch(code)
    return tagged is not None and tagged["code"] in known_languages()


def check_language(code: str, where: str) -> str:
    """Return ``code`` if it is known.

    Args:
        code: a language code.
        where: the key or record that names it, for the message.

    Raises:
        ConfigError: if no backbone has the code; the nearest valid one is named.
    """
    if is_known_language(str(code)):
        return str(code)
    suggestion = nearest(str(code).lower(), known_languages())  # a code in capitals is no closer to any other
    codes = "use an ISO 639-1 code (de; with a region: pt-BR) or a FLORES-200 one (deu_Latn)."
    hint = f"did you mean '{suggestion}'?" if suggestion else codes
    raise ConfigError(f"{where}: '{code}' is not a known language; {hint}")


def language_name(code: str) -> str:
    """English name of a language, for prompts that spell it out; the code itself where no name is known.

    Example:
        >>> language_name("de"), language_name("en-US"), language_name("deu_Latn")
        ('German', 'English', 'deu_Latn')
    """
    return _names().get(code) or _names().get(code.split("-")[0], code)


@cache
def flores_code(code: str) -> str | None:
    """The FLORES-200 code of a language, as NLLB writes it; None if NLLB does not have it in that script.

    Example:
        >>> flores_code("de"), flores_code("zh-Hant"), flores_code("pt-BR"), flores_code("deu_Latn"), flores_code("la")
        ('deu_Latn', 'zho_Hant', 'por_Latn', 'deu_Latn', None)
    """
    if code in _flores_codes():
        return code
    language, *subtags = code.split("-")
    language = _ALIASES.get(language, language)
    found = _FLORES_OF_ISO.get(language)
    if found is None:  # a code of three letters that one FLORES-200 code begins with
        candidates = [known for known in _flores_codes() if known.split("_")[0] == language]
        if len(candidates) != 1:
            return None
        found = candidates[0]
    script = next((tag for tag in subtags if len(tag) == 4), None)
    if script is None and language == "zh" and not set(_TRADITIONAL_CHINESE).isdisjoint(subtags):
        script = "Hant"
    written = f"{found[:3]}_{script}" if script else found
    return written if written in _flores_codes() else None


@cache
def m2m100_code(code: str) -> str | None:
    """M2M100's code of a language, whatever its script and region; None if M2M100 does not have it.

    Example:
        >>> m2m100_code("de"), m2m100_code("pt-BR"), m2m100_code("deu_Latn"), m2m100_code("la")
        ('de', 'pt', 'de', None)
    """
    return next((known for known in _shorter_codes(code) if known in _m2m100_codes()), None)


@cache
def mbart_code(code: str) -> str | None:
    """mBART's code of a language, whatever its script and region; None if mBART-50 does not have it.

    Example:
        >>> mbart_code("de"), mbart_code("pt-BR"), mbart_code("deu_Latn"), mbart_code("la")
        ('de_DE', 'pt_XX', 'de_DE', None)
    """
    return next((_mbart_codes()[known] for known in _shorter_codes(code) if known in _mbart_codes()), None)


def _shorter_codes(code: str) -> list[str]:
    """The codes that a language may have in families that do not distinguish scripts, its own first."""
    language = re.split("[-_]", code)[0]
    standard = _ALIASES.get(language, language)
    iso_639_3 = _FLORES_OF_ISO.get(standard, standard)[:3]
    same = [iso for iso, flores in _FLORES_OF_ISO.items() if flores[:3] == iso_639_3]
    aliases = [alias for alias, meant in _ALIASES.items() if meant == standard]
    return [language, standard, *same, *aliases]
