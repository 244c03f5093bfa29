"""The one form of a language's code, by which records, recipes and models are compared.

Codes come from ISO 639-1, -2 and -3, BCP 47 and FLORES-200, and from Whisper, M2M100 and mBART. The rules are those of
the IANA registry of subtags (BCP 47, RFC 5646), by langcodes, except that a macrolanguage and the member of it that all
backbones know under its code are one language (``cmn`` is ``zh``).
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

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
FLORES_OF_ISO = dict(pair.split(":") for pair in _ISO_AND_FLORES.split())
"""The FLORES-200 code of each ISO 639-1 language that NLLB has; of a macrolanguage, its standard (ar: Modern Standard
Arabic; no: Bokmål), and of a language with several scripts the one it is mostly written in."""

_MBART = """
    ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX
    ro_RO ru_RU si_LK tr_TR vi_VN zh_CN af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN
    pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI
"""
MBART_CODES = tuple(_MBART.split())
"""mBART-50's codes, among which are all of mBART's. Their regions say nothing: ``ar_AR`` is no Arabic of Argentina."""

OWN_CODES = {"jw": "jv", "ns": "nso"}
"""Codes of backbones that are not, or no longer, in the registry: Whisper's of Javanese, M2M100's of Northern Sotho."""

_MEMBERS = {
    **{flores[:3]: iso for iso, flores in FLORES_OF_ISO.items() if iso != "no"},  # nob has a code of its own, nb
    "cmn": "zh",  # as in CLDR; NLLB writes zho
    "ekk": "et",
}
"""ISO 639-3 codes that are the same language as an ISO 639-1 code: the same, or the standard of a macrolanguage."""

_PREFERRED = {"drw": "prs", "tnf": "prs"}
"""Preferred values of the registry where langcodes has CLDR's, which are regions of other languages."""

_NO_LANGUAGES = ("mis", "mul", "und", "zxx")
"""Codes of ISO 639-2 for any other language, several languages, an unknown one, and none."""

_SCRIPTS = {"crh": "Latn", "sat": "Beng", "tzm": "Tfng", "ajp": "Arab", "dik": "Latn", "prs": "Arab"}
"""The script of languages for which NLLB has one code, where CLDR has another script or none."""

NEW_CODES = {
    "ajs": "Algerian Jewish Sign Language",
    "bpc": "Mbuk",
    "cnq": "Chung",
    "dsz": "Mardin Sign Language",
    "egm": "Benamanga",
    "gov": "Goo",
    "imt": "Imotong",
    "lgo": "Lango (South Sudan)",
    "lqr": "Logir",
    "lsc": "Albarradas Sign Language",
    "lsw": "Seychelles Sign Language",
    "nww": "Ndwewe",
    "oie": "Okolie",
    "phj": "Pahari",
    "pzh": "Pazeh",
    "rib": "Bribri Sign Language",
    "rnb": "Brunca Sign Language",
    "rsk": "Ruthenian",
    "rsn": "Rwandan Sign Language",
    "tok": "Toki Pona",
    "ugh": "Kubachi",
    "uon": "Kulon",
    "wdt": "Wendat",
    "wyn": "Wyandot",
    "xdq": "Kaitag",
    "xhm": "Middle Khmer (1400 to 1850 CE)",
    "zcd": "Las Delicias Zapotec",
}
"""ISO 639-3 codes that were added after langcodes' copy of the registry (August 2021), up to April 2023, with names."""

_WITH_SPEAKERS = "aaz azz ggu hii idd koo mmr mnn mrr pll ptt ssi tll ttr"
_SPOKEN = frozenset(_WITH_SPEAKERS.split())
"""Languages of about 50,000 speakers or more (Ethnologue) that :func:`slip_of` would take for a slip."""

_ENDS = """
    all ann bak bin bpe cla con csv dev doc fil ids lab lid log low lrc lst mrg neg new old one pos prt raw seg sen sgm
    spm src srt sub sys tar tgt tmp tok tra trg trn tst tsv txt val vid wav xml
"""
_OF_FILES = frozenset(_ENDS.split())
"""Ends of files' names that are codes of languages as well."""

_SHAPE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*|i-[a-z]+|art-lojban", re.ASCII)


@lru_cache(maxsize=16384)
def language_code(code: str) -> str | None:
    """The one form of a language's code; None if it is no code, or a likely slip of another (:func:`slip_of`).

    - ISO 639-1 where there is a code, else ISO 639-3: ``deu``, ``ger`` and ``de`` are ``de``, Mboshi is ``mdw``.
    - Retired codes become the one that the registry prefers (``iw``: ``he``), and ``jw`` and ``ns`` of backbones ISO's.
    - The member of a macrolanguage that is NLLB's for an ISO 639-1 code has that code (``arb``: ``ar``, ``cmn``:
      ``zh``); all other members keep theirs (``arz``, ``yue``). ``no``, ``nb`` and ``nn`` are three codes.
    - A script is left out if the language, in its region too, is usually written in it: ``zho_Hans`` is ``zh``;
      ``zh-Hant`` and ``zh-Hant-TW`` stay.
    - Regions, variants and extensions are kept: ``pt-BR``. mBART's codes (``de_DE``) have none.

    Upper and lower case must be those of the standards (``zh-Hant-TW``, ``deu_Latn``), so that ``en-de`` is no code.

    Example:
        >>> [language_code(code) for code in ("deu", "deu_Latn", "zho_Hans", "pt_BR", "mdw", "en-de", "xx")]
        ['de', 'de', 'zh', 'pt-BR', 'mdw', None, None]
    """
    if code in FLORES_OF_ISO:
        return code
    if code in OWN_CODES:
        return OWN_CODES[code]
    if code in MBART_CODES:
        return code[:2]
    if not isinstance(code, str) or not _SHAPE.fullmatch(code) or ("-" in code and "_" in code) or slip_of(code):
        return None
    return _of_tag(code.replace("_", "-"))


def normalized(code: Any) -> Any:
    """The one form of a code; what is no code stays as it is, for those that check it."""
    return (language_code(code) if isinstance(code, str) else None) or code


def _of_tag(tag: str) -> str | None:
    from langcodes import Language, LanguageTagError, tag_is_valid

    try:
        parsed = Language.get(tag, normalize=False)
        if parsed.language and "-" in parsed.language:  # a whole tag that was registered once: i-klingon
            parsed = Language.get(tag)
        elif parsed.to_tag() != tag:  # of other case, or in another order
            return None
    except LanguageTagError:
        return None
    base = parsed.language
    as_known = re.sub("^[a-z]+", "en", tag) if base in NEW_CODES else tag
    if base is None or base in _NO_LANGUAGES or not tag_is_valid(as_known):
        return None
    if parsed.extlangs:  # zh-yue; of others langcodes does not know whether the language has them: zh-fra
        parsed = Language.get(tag)
        if parsed.extlangs:
            return None
    base = _base_code(parsed.language)
    script, region = parsed.script, parsed.territory
    if script == usual_script(base) == usual_script(base, region) and not slip_of(base):
        script = None
    rest = (script, region, *(parsed.variants or ()), *(parsed.extensions or ()), parsed.private)
    return "-".join([base, *filter(None, rest)])


def _base_code(base: str) -> str:
    """The one form of a code without subtags."""
    from langcodes import standardize_tag

    base = _iso_639_1().get(base, base)
    preferred = _PREFERRED.get(base) or standardize_tag(base)
    # CLDR makes Filipino of Tagalog, and of some languages a script or region of others; the registry does not.
    base = base if base == "tl" or "-" in preferred else preferred
    return _MEMBERS.get(base, base)


@cache
def _iso_639_1() -> dict[str, str]:
    """The code of two letters of each code of three that is the same, the bibliographic ones among them."""
    from langcodes.data_dicts import LANGUAGE_ALPHA3, LANGUAGE_ALPHA3_BIBLIOGRAPHIC

    tables = (LANGUAGE_ALPHA3, LANGUAGE_ALPHA3_BIBLIOGRAPHIC)
    return {long: short for table in tables for short, long in table.items() if len(short) == 2}


def usual_script(base: str, region: str | None = None) -> str | None:
    """The script that a language is usually written in, by the backbones' tables or CLDR; None where neither knows."""
    from babel.core import get_global

    likely = get_global("likely_subtags")  # zh_TW: zh_Hant_TW
    if region is not None and (in_region := likely.get(f"{base}_{region}")):
        return in_region.split("_")[1]
    if base in FLORES_OF_ISO:
        return FLORES_OF_ISO[base][4:]
    return _SCRIPTS.get(base) or (likely[base].split("_")[1] if base in likely else None)


@cache
def slip_of(code: str) -> str | None:
    """The code of two letters that was probably meant by one of three, with a letter typed twice: ``dee`` for ``de``.

    All but few codes of three letters are languages, so that hardly any slip would be noticed. These are taken for
    one: the code of a language of mBART-50 with a letter doubled, if CLDR has no English name for it, and it is none of
    the languages of some size. A script makes it a code: ``dee-Latn``.

    Example:
        >>> slip_of("dee"), slip_of("dde"), slip_of("koo"), slip_of("mdw")
        ('de', 'de', None, None)
    """
    if len(code) != 3 or (code[0] != code[1] and code[1] != code[2]) or code in _SPOKEN:
        return None
    meant = code[1:] if code[0] == code[1] else code[:2]
    if not any(known.startswith(f"{meant}_") for known in MBART_CODES):
        return None
    return meant if code not in _iso_639_1() and cldr_name(code) is None and _of_tag(f"{code}-Zzzz") else None


def cldr_name(base: str) -> str | None:
    """CLDR's English name of a language, None where it has none."""
    return _cldr_names().get(base)


@cache
def _cldr_names() -> dict[str, str]:
    from babel import Locale

    return dict(Locale("en").languages)


def recased(code: str) -> str:
    """A code with upper and lower case as the standards write it: ``en-US``, ``deu_Latn``."""
    language, *subtags = re.split("([-_])", code)
    cased = (tag.title() if len(tag) == 4 else tag.upper() if len(tag) == 2 else tag.lower() for tag in subtags)
    return "".join([language.lower(), *cased])


def language_of_suffix(suffix: str) -> str | None:
    """The language that the end of a file's name is the code of (``de`` of ``train.de``), None if it is none.

    Ends that are usual for other reasons are none, though Citak has the code ``txt``.
    """
    return None if suffix in _OF_FILES else language_code(suffix)
