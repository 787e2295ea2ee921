"""Labels, clean reports, hard negatives and graphs from chest X-ray reports (Sec. 3, Sec. 4.1, Fig. 2).

    python negations.py IN.jsonl --out OUT.jsonl [--labeler rules|chexbert|given] [--llm MODEL] [--graphs rules|FILE.json]

Fig. 2 as a local pipeline: a report r is split into sentences of one clinical entity without comparison to priors, its
positive conditions are found, and for each of them the sentences about it are removed (r^r) and a negated statement is
inserted at the beginning, middle or end (r^n). Rules do all of it; local models may replace the labeler and the editor.
Symbols: r report, r^r report with one entity omitted, r^n report with it negated; labels 1 present, 0 denied, -1 uncertain.

The labeler reads each sentence alone: phrases of a condition (affirming, denying or hedging by themselves) are looked up,
then negation and uncertainty triggers act over a scope that ends at words such as "but" or at a comma before a new statement.

SPDX-License-Identifier: MIT
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

CONDITIONS = (  # CheXbert's order
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding")
OTHER = "Other"  # abnormalities outside the 14, which cancel No Finding

# ---- phrases: condition -> (hedging, denying, affirming patterns)
NORMAL = (r"(?:normal|unremarkable|not remarkable|within limits|not (?:\w+ )?(?:enlarged|widened|prominent)|normally sized)")
UPPER = r"(?:(?:upper|top|high)[ -](?:limits? (?:of )?|range of |of )?(?:the )?normal|top[ -]normal|upper limits?)"  # still normal
BORDER = r"borderline"
BIG = r"(?:enlarged|enlargement|prominent|prominence|increased|large|widened|widening|wide)"
STOP = (r"(?:but|with(?! \w+ limits)|without|however|there|although|while|no|clear|opaci\w+|effusions?|which|"
        r"abnormal|{})")
GAP = r"(?:,?\s(?!" + STOP.format("enlarged|widened|prominent|tortuous|borderline") + r"\b)[\w'/-]+){0,9}?,?\s"
NEAR = (r"(?:\s(?!" + STOP.format("normal|and|pulmonary|lungs?|aort\w+|or|unremarkable") + r"\b)[\w'/-]+){0,5}?\s")
HEART = (r"(?:heart|cardiac|cardio-?\s?mediastinal|cardiopericardial|cardiothymic)"
         r"(?:\s(?:size|silhouettes?|shadow|contours?|outline))?")
MEDIA = r"(?:cardio-?\s?)?mediastin(?:um|al)(?:\s(?:silhouettes?|shadow|contours?|structures|width|size))?"
FINDINGS = {
    "Enlarged Cardiomediastinum": (
        (rf"{MEDIA}{GAP}{BORDER}",),
        (rf"{MEDIA}{GAP}(?:{NORMAL}|{UPPER})", rf"(?:normal|unremarkable)(?:\s[\w,/-]+){{0,5}}?\s{MEDIA}", r"mediastinum normal"),
        (rf"{MEDIA}{NEAR}{BIG}", rf"(?:enlarged|prominent|widened|wide|widening of)(?:\s\w+){{0,2}}?\s{MEDIA}",
         r"mediastinal (?:widening|enlargement|prominence)")),
    "Cardiomegaly": (
        (rf"{HEART}{GAP}{BORDER}", rf"{BORDER}(?:\s\w+){{0,3}}?\s(?:heart|cardiac|cardio\w*)"),
        (rf"{HEART}{GAP}(?:{NORMAL}|{UPPER})", rf"{UPPER}(?:\s\w+){{0,3}}?\s(?:heart|cardiac|cardio\w*)", rf"(?:normal|unremarkable)(?:\s(?!mediast)[\w,/-]+){{0,4}}?\s{HEART}"),
        (r"cardiomegaly", r"cardiac enlargement", rf"enlargement of (?:the )?(?:\w+ )?{HEART}",
         rf"(?:enlarged|large|prominent)(?:\s\w+)?\s{HEART}", rf"{HEART}{NEAR}{BIG}")),
    "Lung Opacity": (
        (),
        (r"(?:lungs?|lung (?:fields?|bases|zones|\w+)|hemithora\w+)(?:\s(?:are|is|remains?|appears?|fields?|\w+ly|otherwise|both|"
         r"well|expanded|and|normally|inflated|aerated)){0,5}\sclear(?! of)", r"clear(?:\s\w+)?\slungs?"),
        (r"(?:\w+ )?opaci(?:ty|ties|fi\w+)", r"infiltrat\w+", r"air[ -]?space (?:disease|process|\w+ disease)",
         r"haz(?:e|y|iness)\b", r"ground[ -]glass")),
    "Lung Lesion": (
        (),
        (),
        (r"(?:micro)?nodul(?:es?|ar\w*)(?! (?:infiltr|contour|interst|pattern))(?: (?:opacit\w+|densit\w+|lesions?))?", r"mass(?:es)?\b(?! effect)(?:[- ]like)?", r"tumou?rs?",
         r"neoplas\w+", r"malignan\w+", r"\w*carcinomas?", r"cancers?", r"metasta\w+",
         r"(?:lung|pulmonary|cavitary|cavitating|focal) lesions?")),
    "Edema": ((), (), (r"(?<!tissue )(?:(?:pulmonary|interstitial|alveolar) )*o?edema",)),
    "Consolidation": ((), (), (r"consolidat\w+",)),
    "Pneumonia": ((), (), (r"(?:broncho)?pneumoni(?:a|as|ae|tis)\b", r"(?<!granulomatous )(?<!prior )(?<!old )(?<!previous )(?<!remote )infecti\w+(?: process| etiology)?")),
    "Atelectasis": ((), (), (r"atelecta\w+", r"(?:lobar|lobe|lung) collapse", r"collaps\w+ (?:\w+ )?(?:lobe|lung)")),
    "Pneumothorax": ((), (), (r"(?:hydro)?pneumo-?thora\w+", r"ptx\b")),
    "Pleural Effusion": (
        (),
        (r"pleural spaces?(?:\s\w+)?\sclear",),
        (r"(?<!pericardial )(?<!joint )effusions?", r"pleural (?:\w+ )?fluid", r"hydropneumothora\w+", r"ha?emothora\w+")),
    "Pleural Other": (
        (), (),
        (r"pleural(?:[- ]\w+)? (?:thicken\w*|scar\w*|plaques?|calcif\w+|capping|cap)", r"thicken\w+ of the (?:\w+ )?pleura",
         r"(?:bi)?apical cap\w*", r"pleuro-?parenchymal \w+", r"fibrothorax")),
    "Fracture": ((), (), (r"fractur\w*",)),
    "Support Devices": (
        (), (),
        (r"(?:\w+ )?tubes?\b(?! projects)", r"(?:central|venous|picc|ij|jugular|subclavian|arterial|piccs?) (?:\w+ )?lines?\b", r"\w*catheters?\b", r"piccs?\b",
         r"pace-?maker\w*", r"(?:port-?a-?cath\w*|mediport|infusion port|chest port)", r"(?:pacer|pacing|icd|aicd|ventricular|monitor\w*) (?:\w+ )?(?:leads?|wires?)",
         r"(?:sternal|sternotomy|cerclage) (?:wires?|sutures?)", r"(?:surgical |\w+ )?clips?\b", r"(?:\w+ )?devices?\b", r"stents?\b",
         r"(?:prosthetic|mechanical|artificial|bioprosthetic) (?:\w+ )?valves?", r"valve (?:replacement|prosthesis)", r"a?icd\b", r"defibrillators?",
         r"(?:pigtail|chest|pleural) drains?", r"prosthe\w+", r"hardware", r"screws?\b", r"stimulators?", r"generators?", r"balloon pump")),
    OTHER: (
        (), (),
        (r"\w*granulom\w+", r"scar(?:s|red|ring)?\b", r"\w*emphysem\w+", r"copd", r"obstructive", r"hyper-?(?:inflat|expan|aerat|lucen)\w*", r"hypo-?(?:inflat|aerat|ventil)\w*",
         r"fibro(?:sis|tic)", r"\w*scolio\w+", r"curvature", r"post-?traumatic", r"\w*kypho\w+", r"spond\w+", r"degenerat\w+", r"osteophyt\w+", r"arthr\w+", r"spur\w*", r"osteo(?:pen|por)\w+",
         r"deminerali\w+", r"hernia\w*", r"tort[uo]+r?o\w+", r"ectat\w+|ectasia", r"unfold\w+", r"uncoil\w+", r"\w*sclero(?:sis|tic)", r"calcif\w+", r"aneurysm\w*", r"eventrat\w+",
         r"elevat\w+", r"(?:low|small|decreased|diminished|reduced) (?:lung )?(?:volumes?|inspir\w+)", r"volumes? (?:are |is )?(?:low|decreased)", r"volume loss", r"\w*adenopath\w+", r"bronchiectas\w+", r"thicken\w+",
         r"congesti\w+", r"engorge\w+", r"prominen\w+", r"enlarge\w+", r"deformit\w+", r"dislocat\w+", r"cysts?\b|cystic", r"bull(?:a|ae|ous)\b", r"blebs?\b",
         r"cavit(?:y|ary|ation)", r"sarcoid\w*", r"tubercul\w+", r"hyperosto\w+", r"foreign bod\w+", r"blunt\w+", r"(?:increased|coarse\w*|crowd\w+) (?:\w+ )*?markings", r"crowding",
         r"flatten\w+", r"pectus", r"lucen\w+", r"heart failure", r"chf\b", r"hypertension", r"pneumoperitone\w+", r"free (?:\w+ )?air", r"shift\w*", r"deviat\w+", r"fullness",
         r"sternotomy", r"(?:post-?)?(?:surg|operat)\w+ change\w*", r"\w+ectomy", r"cabg", r"bypass", r"effusions?", r"density|densities", r"lesions?", r"distort\w+", r"retract\w+", r"chronic \w+ (?:change|disease)\w*",
         r"(?:lung|pulmonary|cardiopulmonary|active|acute|bony|bone|osseous|\w+) (?:abnormalit\w+|process|disease|findings?)", r"abnormalit\w+", r"injur\w+")),
}
# ---- triggers, in order of preference; "skip" are look-alikes that change nothing
TRIGGERS = re.compile(r"(?:" + "|".join(f"(?P<{kind}_{i}>{pattern})" for i, (kind, pattern) in enumerate((
    ("hedge", r"(?:cannot|can not|can't|could not|not|difficult to|hard to)(?: \w+)? (?:be )?(?:entirely |completely |definitely )?(?:exclude|ruled? out)d?"),
    ("hedge", r"(?:is |are )?not (?:entirely |completely )?excluded"),
    ("skip", r"(?:no|not|without)(?: \w+){0,2}? (?:changed?\b|changes (?:in|from|since)|increased?|decreased?|difference|worsen\w+|improve\w+|progress\w+)\b(?: (?:in|of))?"),
    ("skip", r"not (?:only|include\w*|(?:well |fully |completely )?(?:evaluated|assessed))|no (?:comparison|priors?|previous)\b"),
    ("skip", r"(?:not|better)(?: \w+)? (?:seen|visuali[sz]ed|present|noted|apparent|identified|appreciated)(?: \w+)? on (?:the )?(?:\w+ )?(?:prior|previous|lateral|frontal)"),
    ("skip", r"(?:near|nearly|almost|partial|incomplete)[- ](?:\w+ )?(?:resolution|resolved|cleared|clearing)(?: of)?"),
    ("skip", r"(?:compatible|consistent|associated|in keeping|correlat\w+|along|together) with"),
    ("denied", r"(?:is|are|was|were|has|have|had)(?: now| since| been| completely)* (?:ruled out|excluded|absent|resolved|cleared|removed|gone)\b"),
    ("ignore", r"(?:recommend\w*|advise\w*|correlat\w+|evaluat\w+ (?:for|of|to)|assess\w* (?:for|of)|sensitive|obscur\w+|history of|h/o|please note|to identify|look for|follow-?up|f/u)\b"),
    ("denied", r"(?:not|no longer) (?:\w+ )?(?:seen|visuali[sz]ed|identified|present|evident|noted|demonstrated|appreciated|detected|found)|ruled out|unlikely"),
    ("no", r"(?:negative|free|clear) (?:for|of|from)|absence of|no longer|rather than|instead of|(?:interval |complete )?(?:removal|resolution|clearing|absence) of|resolved|removal of"),
    ("no", r"(?:no|not|without|w/o|never|neither|nor|denies|absent|non)\b"),
    ("hedge", r"(?:is |are )?(?:also |again )?(?:suspected|questioned|possible|considered|favou?red)(?=\W*$)"),
    ("maybe", r"(?:may|might|could)(?: also| well)?(?: be)?(?: (?:secondary|due|related) to)?\b|(?:possibl[ey]|probabl[ey]|likely|suspect\w*|suspicious|concern\w*|question\w*|consider\w*|suggest\w*|perhaps|potential\w*|worrisome|"
              r"presum\w*|doubt\w*|rule out|exclude|versus|vs|differential|equivocal|apparent|borderline|if)\b"),
    ("hedge", r"(?:is|are) (?:possible|suspected|questioned|considered|likely|probable|a consideration|in the differential)|not entirely"),
    ("end", r"(?:but|however|although|though|except|aside from|other than|otherwise|apart from|which|secondary to|because|while|whereas|yet)\b|[;:]"),
    ("end", r"(?:,|and\b)(?= (?:the|there|stable|heart|lungs?|cardi\w+|mediast\w+|is|are|possibl[ey]|probabl[ey]|likely|may|with|consistent|compatible|unchanged|status|again|which|however|visuali\w+|limited)\b)"),
    ("end", r"(?:,|and\b)(?= (?:a|an|mild\w*|moderate\w*|minimal\w*|marked\w*|severe\w*|small|large|tortuous|degenerative|normal|low|prominent|calcified|chronic|old|healed|bilateral|left|right|multiple|"
            r"hyper\w+) (?![^.;]*\b(?:or|nor)\b))|,? with\b"),
))) + ")")
VERSUS = re.compile(r"\b(?:versus|vs|and/or|or)\b")
PRESENT, DENIED, UNCERTAIN = 1, 0, -1


def _compile(name, hedge, deny, affirm):
    """(stems, pattern): a sentence without any of the stems cannot match, which spares most searches."""
    literal = re.sub(r"\\.|\[[^]]*\]|\w\?|\(\?:[^()]*\)\?", " ", " ".join((*hedge, *deny, *affirm)))
    stems = {"Cardiomegaly": ["heart", "card"], "Enlarged Cardiomediastinum": ["mediast"]}.get(name) or re.findall(r"[a-z]{3,}", literal)
    groups = [f"(?P<{kind}>{'|'.join(p)})" for kind, p in (("hedge", hedge), ("deny", deny), ("affirm", affirm)) if p]
    return re.compile("|".join(set(stems))), re.compile(r"\b(?:" + "|".join(groups) + ")")


_FINDINGS = {name: _compile(name, *row) for name, row in FINDINGS.items()}


@lru_cache(1 << 16)
def _candidates(word):
    return frozenset(name for name, (stems, _) in _FINDINGS.items() if stems.search(word))


@lru_cache(1 << 16)
def _triggers(lower):
    return tuple((m.lastgroup.split("_")[0], m.start(), m.end()) for m in TRIGGERS.finditer(lower))


def _scope(lower, start, end):
    """1, 0 or -1 of a mention: triggers before it up to the last scope end, then triggers after it."""
    value = PRESENT
    for kind, first, last in reversed(_triggers(lower)):
        if first >= end or (last > start and kind == "end"):
            continue
        if kind == "end":
            break
        if kind == "ignore":
            return None
        if kind == "no":
            return DENIED
        if kind in ("maybe", "hedge"):
            value = UNCERTAIN
    for kind, first, _ in _triggers(lower):
        if first < end or kind in ("no", "skip", "ignore", "maybe"):
            continue
        if kind == "end":
            break
        if kind == "denied":
            return DENIED
        if kind == "hedge":
            value = UNCERTAIN
    return value


def mentions(sentence):
    """All findings of one sentence: tuple of (condition or "Other", value 1 | 0 | -1, start, end) by position."""
    lower = sentence.lower()
    if len(lower) != len(sentence):  # a few capitals grow when lowered; offsets must not
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in sentence)
    return _mentions(lower.rstrip(" ."))


@lru_cache(1 << 16)
def _mentions(lower):
    found = []
    candidates = frozenset().union(*map(_candidates, lower.split()))
    for name in (name for name in _FINDINGS if name in candidates):
        for m in _FINDINGS[name][1].finditer(lower):
            if name == OTHER and any(s < m.end() and m.start() < e for _, _, s, e in found):
                continue
            value = {"hedge": UNCERTAIN, "deny": DENIED}.get(m.lastgroup)
            value = _scope(lower, *m.span()) if value is None else value
            if value is not None:
                found.append((name, value, *m.span()))
    return tuple(sorted(_differential(lower, found), key=lambda m: m[2:]))


def _differential(lower, found):
    """"A or B" and "A versus B" of two affirmed findings make both uncertain."""
    unsure = set()
    present = sorted((m for m in found if m[1] != DENIED), key=lambda m: m[2])
    for a, b in itertools.pairwise(present):
        if VERSUS.search(lower, a[3], b[2]) and "," not in lower[a[3]:b[2]] and a[0] != b[0]:
            unsure |= {a, b}
    return [(m[0], UNCERTAIN, *m[2:]) if m in unsure else m for m in found]


def _sentence_labels(sentence):
    return _merge(m[:2] for m in mentions(sentence))


def _merge(pairs):
    """A condition's value over its mentions: present beats uncertain beats denied."""
    labels = {}
    for name, value in pairs:
        if name not in labels or abs(value) > abs(labels[name]) or value == PRESENT:
            labels[name] = value
    return labels


def label_report(text):
    """CheXpert labels of a report by rules: {condition: 1 present | 0 denied | -1 uncertain}, absent = not mentioned.

    No Finding is 1 when no abnormality, inside or outside the 14, is present or uncertain (support devices aside).
    """
    sentences = _sentences(text)
    labels = _merge(pair for s in sentences for pair in _sentence_labels(s).items())
    normal = sentences and not any(v for name, v in labels.items() if name != "Support Devices")
    labels.pop(OTHER, None)
    return {**{c: labels[c] for c in CONDITIONS if c in labels}, **({"No Finding": 1} if normal else {})}


def positives(labels):
    """Names among the 13 conditions besides No Finding whose value is 1, in CheXbert's order."""
    return [c for c in CONDITIONS[:-1] if labels.get(c) == 1]


# ---- sentences and time (Sec. 3, Fig. 2 step i)
_BREAK = re.compile(r"(?<=[.!?])(?<!\bDr\.)(?<!\bvs\.)\s+|(?<=[a-z]{2}[.])(?=[A-Z])|(?<=;)\s+|\s(?=\d{1,2}[.)] [A-Z])")
_NUMBER = re.compile(r"^\W*(?:\d{1,2}[.)](?!\d)\s*)?(?:(?:findings|impression|chest|conclusion)\s*:\s*)?", re.I)
_CUT = re.compile(r",?\s+(?:and/or|and|or|nor|versus|vs\.?|with(?=out)|with|but|however|although|while|as well as)\b,?\s+|[,;]\s+|,?\s+(?=without\b)")
_ANATOMY_LIST = re.compile(r"^(?P<lead>(?:the |both |normal |unremarkable )*)(?P<items>[\w\s,/-]+?,? and (?:the )?[\w\s-]+?)"
                           r"(?P<tail>\s(?:(?:are|is|appears?|remains?|within|grossly|normal|unremarkable|clear)\b.*))?$", re.I)
_ADJECTIVE = re.compile(r"(?:cardiac|mediastinal|hilar|pulmonary|pleural|osseous|bony|cardiomediastinal)$", re.I)


@lru_cache(1 << 14)
def _sentences(text):
    parts = (_NUMBER.sub("", part).strip() for part in _BREAK.split(" ".join(text.split())))
    return tuple(part for part in parts if re.search(r"\w", part))


def _finish(piece):
    piece = piece.strip(" ,;:-.")
    return piece[:1].upper() + piece[1:] + "." if piece else ""


def _same(pieces, sentence):
    return _merge(p for piece in pieces for p in _sentence_labels(piece).items()) == _sentence_labels(sentence)


@lru_cache(1 << 16)
def _split(sentence):
    """One entity a sentence where a list or a conjunction can be cut without changing any label."""
    for cut in (_cut_anatomy, _cut_findings):
        pieces = cut(sentence)
        if len(pieces) > 1 and _same(pieces, sentence):
            return tuple(p for piece in pieces for p in _split(piece))
    return (_finish(sentence),)


def _cut_anatomy(sentence):
    match = _ANATOMY_LIST.match(sentence.strip(" ."))
    if not match or not (match["tail"] or re.search("normal|unremark", match["lead"], re.I)):
        return ()
    items = [i.removeprefix("the ").strip() for i in re.split(r",\s*(?:and\s+)?|\s+and\s+", match["items"]) if i.strip()]
    if any(len(i.split()) > 4 or re.search(r"\b(?:is|are|no|without|with|of)\b", i) for i in items):
        return ()
    head = items[-1].split()[-1]
    items = [f"{i} {head}" if _ADJECTIVE.search(i) else i for i in items]
    return tuple(_finish(f"{match['lead']}{i}{match['tail'] or ''}") for i in items)


def _cut_findings(sentence):
    found = mentions(sentence)
    pieces, begin = [], 0
    for a, b in itertools.pairwise(found):
        cut = _CUT.search(sentence, a[3], b[2] + 1)
        if cut and cut.start() > begin and cut.end() <= b[2]:
            pieces.append((begin, cut.start()))
            begin = cut.end()
    pieces.append((begin, len(sentence)))
    out = []
    for start, end in pieces:
        values = {m[1] for m in found if start <= m[2] < end}
        piece = sentence[start:end].strip(" ,;.")
        now = {m[1] for m in mentions(piece)}
        if values != now and len(values) == 1:
            piece = {DENIED: "No ", UNCERTAIN: "Possible ", PRESENT: ""}[min(values)] + piece[:1].lower() + piece[1:]
        out.append(_finish(piece))
    return tuple(out)


def split_sentences(text):
    """Sentences of one clinical entity each, as far as rules can cut lists and conjunctions (Sec. 3)."""
    return [piece for sentence in _sentences(text) for piece in _split(sentence)]


_PRIOR = r"(?:prior|previous|earlier|comparison|recent|old|last|outside|preceding|exam\w*|stud(?:y|ies)|radiographs?|films?|x-?rays?|xxxx|ct)"
_GONE = re.compile(r"\b(?:interval |complete )*(?:removal|resolution|clearing) of|(?:has|have|had) (?:been )?(?:since )?(?:removed|resolved|cleared)|\bno longer\b", re.I)
_TEMPORAL = [(re.compile(pattern, re.I), to) for pattern, to in (
    (rf",?\s*\b(?:when |as )?(?:compar(?:ed|ing|ison)|in comparison|relative|similar(?: in appearance)?|unchanged|stable|change[ds]?|differ\w+)(?: \w+ly)? (?:to|with|from|since)(?: \S+){{0,3}}? {_PRIOR}\b[^,.;]*,?", " "),
    (rf",?\s*\b(?:since|from|than|on|as on|as of)(?: the| a| his| her| most)*(?: (?:most recent|immediate))? (?:prior|previous|last|earlier|preceding|comparison)\b[^,.;]*,?", " "),
    (r",?\s*\b(?:in|over|during|for) the interval\b,?|,?\s*\bin the interim\b,?", " "),
    (r"\b(?:no|without)(?: \w+){0,2}? (?:change|progression|improvement|worsening|increase|decrease)(?:s)?(?: (?:in|of)(?: the)?|$|(?=[,.;]))", " "),
    (r"\binterval (?:development|appearance|increase|decrease|worsening|improvement|progression|placement|enlargement|change)s?(?: (?:of|in))?(?: the)?", " "),
    (r"\b(?:not |no )?(?:significantly |essentially |relatively |grossly |overall )?(?:unchanged|changed|stable)(?: in (?:appearance|size|position|configuration))?\b", " "),
    (r"\b(?:stable|unchanged|similar) (?:in )?appearance of(?: the)?", " "),
    (r"\b(?:slightly |mildly |significantly |markedly |further )?(?:worsen(?:ed|ing)|improv(?:ed|ing)|resolving|enlarging|persistent(?:ly)?|recurrent|residual|redemonstrat(?:ed|ion of)|interval(?:ly)?)\b", " "),
    (r"\b(?:has|have) (?:slightly |significantly |mildly )?(?:increased|decreased|progressed|worsened|improved|developed|changed)(?: in (?:size|number|extent))?", " "),
    (r"\b(?:again|previously|newly|now)(?: (?:seen|noted|demonstrated|identified|visuali[sz]ed|described|is|are))*\b", " "),
    (r"\b(?:a )?new\b(?! york)", " "),
    (r"\bremains?\b", "is"),
)]
_TIME_WORD = re.compile(r"compar|relative|similar|chang|stabl|differ|since|prior|previous|last|earlier|preced|interval|interim|progress|worsen|improv|increas|decreas|"
                        r"enlarging|persist|recurr|residual|redemonst|resol|clear|remov|develop|again|new|now|remain|no longer", re.I)
_EMPTY_TAIL = re.compile(r"(?:\b(?:is|are|has|have|been|appears?|there|to|be|and|but|with|of|in|or|also|again)\W*)+$", re.I)
_EMPTY_HEAD = re.compile(r"^(?:(?:and|but|or|,|which|is|are|of|in|however|otherwise)\b\W*|\W+)+(?=\S)", re.I)
_CONTENT = re.compile(r"\b(?!(?:the|a|an|is|are|of|in|there|chest|exam\w*|stud(?:y|ies)|appearance|findings?|xxxx|this|these|it|and|or|with|to|no|not|has|have|been|from|by|"
                      r"comparison|compar\w+|prior|previous|available|none|interval|change[ds]?|otherwise|overall|radiographs?|films?|at|for|made|significant|x-?ray|as|on|significantly|views?|also|\d+)\b)[a-z0-9][\w/-]+", re.I)


@lru_cache(1 << 16)
def _timeless(sentence):
    """The sentence without comparison to priors; "" if nothing else was said."""
    text = sentence
    if not _TIME_WORD.search(text):
        return text if _CONTENT.search(text) or mentions(text) else ""
    if _GONE.search(text) and any(m[1] == DENIED for m in mentions(text)):
        text = " ".join(("No " if m[1] == DENIED else "") + _noun_phrase(text, m) + "." for m in mentions(text))
    for pattern, to in _TEMPORAL:
        text = pattern.sub(to, text)
    text = re.sub(r"\s+([,.;])", r"\1", " ".join(text.split()))
    text = text if text == sentence else _finish(_EMPTY_HEAD.sub("", _EMPTY_TAIL.sub("", text.strip(" ,;."))))
    if not _CONTENT.search(text) and not mentions(sentence):
        return ""
    return text if text and _same((text,), sentence) else sentence


def remove_temporal(text):
    """The report without comparison to prior examinations; the findings and their labels stay (Sec. 3)."""
    return " ".join(filter(None, (_timeless(s) for s in _sentences(text))))


def clean(text):
    """One entity a sentence, no comparison with priors: the list of sentences of the cleaned report r (Fig. 2, i)."""
    return [piece for s in _sentences(text) for t in _sentences(_timeless(s)) for piece in _split(t)]


# ---- words that modify: shared by noun phrases and graphs
SIDES = set("left right bilateral bibasilar bilaterally biapical basilar basal apical lower upper middle mid midlung lingular retrocardiac perihilar hilar "
            "peripheral central medial lateral anterior posterior thoracic lumbar cervical subclavian jugular cardiac mediastinal pleural pulmonary both".split())
SIZES = set("mild mildly moderate moderately severe severely minimal minimally marked markedly trace tiny small large massive subtle slight slightly patchy focal "
            "diffuse multifocal scattered streaky linear hazy dense ill-defined acute chronic subsegmental segmental platelike discoid interstitial alveolar airspace "
            "calcified displaced nondisplaced healed old compression multiple few several early extensive faint vague loculated layering borderline nodular coarse "
            "reticular bullous bandlike confluent active significant definite prominent mixed round rounded".split())
PLACES = set("lung lungs lobe lobes base bases apex apices hilum hila heart silhouette mediastinum aorta trachea diaphragm hemidiaphragm hemidiaphragms rib ribs spine "
             "clavicle pleura pleural lingula svc atrium ventricle stomach humerus shoulder sternum vertebra vertebrae vertebral cardiomediastinal contour contours vasculature vascularity "
             "angle angles sulcus zone zones bones osseous structures hemithorax thorax chest abdomen fissure vessels artery arteries vein interstitium bronchi carina "
             "cardiopulmonary bony skeletal soft tissues airways field fields".split())
STATES = set("normal clear unremarkable intact midline expanded inflated aerated satisfactory limits".split())
_WORD = re.compile(r"[\w'/-]+")
_PLACE_TAIL = re.compile(r"\s(?:in|of|at|within|involving|overlying)(?: the)?((?: [\w-]+){0,3}? (?:" + "|".join(sorted(PLACES)) + r"))\b", re.I)


def _noun_phrase(sentence, mention):
    """The mention with the side, size and place words around it: "small left effusion"."""
    start, end = mention[2:]
    for word in reversed(list(_WORD.finditer(sentence, 0, start))):
        if word[0].lower() not in SIDES | SIZES | PLACES or sentence[word.end():start].strip():
            break
        start = word.start()
    tail = _PLACE_TAIL.match(sentence, end)
    return sentence[start:tail.end() if tail else end]


# ---- omission and negation (Sec. 3, Sec. 4.1, Fig. 2 step ii)
NOUNS = {  # condition -> nouns for the negated statement, and whole statements beside the templates
    "Enlarged Cardiomediastinum": (("mediastinal widening", "enlargement of the mediastinum"), ("The mediastinum is normal in width.",)),
    "Cardiomegaly": (("cardiomegaly", "cardiac enlargement"), ("The heart is normal in size.", "Heart size is within normal limits.")),
    "Lung Opacity": (("pulmonary opacity", "airspace opacity", "lung infiltrate"), ()),
    "Lung Lesion": (("pulmonary nodule or mass", "lung mass", "pulmonary nodule"), ()),
    "Edema": (("pulmonary edema", "edema"), ()),
    "Consolidation": (("consolidation", "focal consolidation"), ()),
    "Pneumonia": (("pneumonia",), ()),
    "Atelectasis": (("atelectasis",), ()),
    "Pneumothorax": (("pneumothorax",), ()),
    "Pleural Effusion": (("pleural effusion", "pleural fluid"), ()),
    "Pleural Other": (("pleural thickening",), ()),
    "Fracture": (("fracture", "displaced fracture"), ()),
    "Support Devices": (("support device", "catheter or tube"), ()),
}
TEMPLATES = ("No {}.", "There is no {}.", "No evidence of {}.", "No {} is seen.", "Negative for {}.", "There is no evidence of {}.")
# ASSUMPTION: if nothing remains after omission, r^r is this sentence, which states no finding, since an empty text has no meaning to embed.
NOTHING_LEFT = "Frontal chest radiograph."


@lru_cache(1 << 16)
def _omit(sentence, condition):
    """The sentence without the condition, "" if that was all; other present findings are kept as noun phrases."""
    found = mentions(sentence)
    if all(m[0] != condition for m in found):
        return sentence
    kept = []
    for name in dict.fromkeys(m[0] for m in found if m[0] != condition and m[1]):
        best = max((m for m in found if m[0] == name), key=lambda m: (m[1] == PRESENT, m[1] != DENIED))
        lead = "Possible " if best[1] == UNCERTAIN else ""
        choices = [_finish(lead + _noun_phrase(sentence, best)), _finish(lead + sentence[best[2]:best[3]])]
        choices += [_finish(lead + NOUNS[name][0][0])] if name in NOUNS else []
        for choice in choices:
            labels = _sentence_labels(choice)
            if labels.get(name) == best[1] and condition not in labels:
                kept.append(choice)
                break
    return " ".join(kept)


def _omitted(sentences, condition):
    return [t for s in sentences for t in _sentences(_omit(s, condition))]


def omit(text, condition):
    """r^r: the cleaned report without the sentences about the condition, affirmed or denied (Sec. 3)."""
    return " ".join(_omitted(_sentences(text), condition)) or NOTHING_LEFT


def _insert(rest, condition, rng):
    """Inserts a negated statement; returns (r^n, position). Positions that coincide in a short report are not drawn."""
    nouns, statements = NOUNS[condition]
    choices = [t.format(n) for t in TEMPLATES for n in nouns]
    statement = rng.choice(statements) if statements and rng.random() < 0.25 else rng.choice(choices)
    position = rng.choice(("beginning", "middle", "end")[:: 2 if len(rest) < 2 else 1] if rest else ("beginning",))
    at = {"beginning": 0, "end": len(rest)}.get(position)
    at = rng.randrange(1, len(rest)) if at is None else at
    return " ".join([*rest[:at], statement, *rest[at:]]), position


def negate(text, condition, rng):
    """(r^r, r^n) of a cleaned report: the condition omitted, and denied at a random place (Sec. 3, Fig. 2).

    rng is a random.Random; it chooses the phrasing and the position.
    """
    rest = _omitted(_sentences(text), condition)
    return " ".join(rest) or NOTHING_LEFT, _insert(rest, condition, rng)[0]


def _negated_labels(labels, condition, others):
    """r's labels with the condition set to 0; No Finding is 1 if nothing positive or uncertain remains."""
    out = {c: v for c, v in labels.items() if c != "No Finding"} | {condition: 0}
    if not others and not any(v for c, v in out.items() if c != "Support Devices"):
        out["No Finding"] = 1
    return {c: out[c] for c in CONDITIONS if c in out} | {c: v for c, v in out.items() if c not in CONDITIONS}


# ---- graphs in RadGraph's schema
_TOKEN = re.compile(r"[\w'/-]+(?:\.\d+)?|[^\w\s]")
_SUGGEST = re.compile(r"\b(?:suggest\w*|represent\w*|consistent|compatible|reflect\w*|concerning|indicat\w*|due to|secondary to|worrisome)\b", re.I)
_LABEL = {PRESENT: "OBS-DP", DENIED: "OBS-DA", UNCERTAIN: "OBS-U"}
_FUNCTION = set("the a an is are was were of in at to with and or within no not size there be appears appear on for may".split())


def _token_kinds(sentence):
    """Each token's (text, kind, value, mention index): kind "anatomy" | "modifier" | "place" | "finding" | ""."""
    found, out = mentions(sentence), []
    for m in _TOKEN.finditer(sentence):
        word = m[0].lower()
        index = next((i for i, f in enumerate(found) if f[2] <= m.start() < f[3]), None)
        kind = ("anatomy" if word in PLACES else "place" if word in SIDES else "modifier" if word in SIZES else
                "finding" if word in STATES or (index is not None and word not in _FUNCTION and word[0].isalnum()) else "")
        value = PRESENT if word in STATES or index is None else found[index][1]
        out.append((m[0], kind, value, index))
    return out


@lru_cache(1 << 16)
def _sentence_graph(sentence):
    """(tokens, nodes): a node is [first token, last token, RadGraph label, [(relation, index of the target node)]]."""
    kinds, nodes = _token_kinds(sentence), []  # (first, last, kind, value, mention)
    for i, (_, kind, value, index) in enumerate(kinds):
        if kind == "finding" and nodes and nodes[-1][1] == i - 1 and nodes[-1][2] == kind and nodes[-1][4] == index:
            nodes[-1][1] = i
        elif kind:
            nodes.append([i, i, kind, value, index])
    suggest = _SUGGEST.search(sentence)
    middle = len(_TOKEN.findall(sentence[:suggest.start()])) if suggest else -1
    findings = [i for i, n in enumerate(nodes) if n[2] == "finding"]
    anatomy = [i for i, n in enumerate(nodes) if n[2] == "anatomy"]
    heads = {"modifier": findings or anatomy, "place": sorted(anatomy + findings), "finding": anatomy, "anatomy": []}
    out = []
    for i, (first, last, kind, value, _) in enumerate(nodes):
        relations, near = [], None
        if heads[kind]:  # a modifier stands before its head more often than after it
            near = min(heads[kind], key=lambda h: (abs(h - i) + 3 * (h < i and kind != "finding"), h))
            relations.append(("located_at" if kind == "finding" else "modify", near))
        later = [f for f in findings if nodes[f][0] > middle]
        if kind == "finding" and last < middle and later:
            relations.append(("suggestive_of", later[0]))
        if kind == "modifier" and near is not None:
            value = nodes[near][3]
        out.append((first, last, "ANAT-DP" if kind in ("anatomy", "place") else _LABEL[value], relations))
    return [k[0] for k in kinds], out


def rule_graph(sentences):
    """A RadGraph record by rule: anatomy and findings, modify / located_at / suggestive_of, absent and uncertain labels."""
    text, entities = [], {}
    for tokens, nodes in map(_sentence_graph, sentences):
        at, base = len(text), len(entities) + 1
        for i, (first, last, label, relations) in enumerate(nodes):
            entities[str(base + i)] = {"tokens": " ".join(tokens[first:last + 1]), "label": label, "start_ix": at + first,
                                       "end_ix": at + last, "relations": [[name, str(base + to)] for name, to in relations]}
        text += tokens
    return {"text": " ".join(text), "entities": entities, "data_source": "rules"}


def _about(text, condition):
    """Indices of the tokens of text that mention the condition."""
    hit, at = set(), 0  # at: index of the sentence's first token
    for sentence in re.split(r"(?<= [.;]) ", text):
        for _, _, start, end in (m for m in mentions(sentence) if m[0] == condition):
            hit.update(range(at + sentence.count(" ", 0, start), at + sentence.count(" ", 0, end - 1) + 1))
        at += sentence.count(" ") + 1
    return hit


def negated_graph(graph, condition):
    """r^n's record: r's without the entities of the condition, and with one absent observation of it added."""
    entities, hit = graph["entities"], _about(graph["text"], condition)
    gone = {k for k, e in entities.items() if e["label"][:4].upper() != "ANAT" and not hit.isdisjoint(range(e["start_ix"], e["end_ix"] + 1))}
    linked = {k: {t for _, t in e["relations"]} for k, e in entities.items()}
    sources = {}
    for k, targets in linked.items():
        for t in targets:
            sources.setdefault(t, set()).add(k)
    fresh = gone
    while fresh:  # what only modified or located a removed entity goes with it
        near = set().union(*(linked[k] | sources.get(k, set()) for k in fresh)) - gone
        fresh = {k for k in near if linked.get(k, sources.get(k, set())) <= gone and (linked[k] or sources[k] <= gone)}
        gone = gone | fresh
    kept = {k: e | {"relations": [r for r in e["relations"] if r[1] not in gone]} for k, e in entities.items() if k not in gone}
    noun = NOUNS[condition][0][0].split(" or ")[0]
    style = "Observation::definitely absent" if any("::" in e["label"] for e in entities.values()) else "OBS-DA"
    first = graph["text"].count(" ") + 2 if graph["text"] else 1
    kept[str(max(map(int, entities), default=0) + 1)] = {"tokens": noun, "label": style, "start_ix": first,
                                                         "end_ix": first + noun.count(" "), "relations": []}
    return graph | {"text": f"{graph['text']} no {noun} .".strip(), "entities": kept}


# ---- one record, and files of them
def annotate(record, *, seed=0, label=label_report, graph=None, stats=None):
    """The rules pipeline for one manifest record: cleaned report, labels, graph and hard negatives.

    Pure and deterministic in (seed, record["id"]). label: text -> labels, of the cleaned report. graph: r's RadGraph record.
    """
    stats = Counter() if stats is None else stats
    original = record.get("original_report", record["report"])
    sentences = clean(original)
    text = " ".join(sentences)
    labels = label(text)
    own = record.get("graph")
    graph = graph or (own if own and own.get("data_source") != "rules" else rule_graph(sentences))
    rng = random.Random(f"{seed}/{record['id']}")
    order = positives(labels)
    rng.shuffle(order)  # the first is CXR-Align's choice (Sec. 3: "randomly select one entity")
    negatives = []
    for condition in order:
        rest = _omitted(sentences, condition)
        if rest == sentences:
            stats["skipped: condition not found in the text"] += 1
            continue
        report, position = _insert(rest, condition, rng)
        others = any(name == OTHER and value for s in rest for name, value, *_ in mentions(s))
        negatives.append({"condition": condition, "omitted": " ".join(rest) or NOTHING_LEFT, "report": report, "position": position,
                          "labels": _negated_labels(labels, condition, others), "graph": negated_graph(graph, condition)})
    return record | {"report": text, "original_report": original, "labels": labels, "graph": graph, "hard_negatives": negatives}


def _lines(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _parse(path, number, line):
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):  # the message must not show the line
        raise ValueError(f"{path}:{number}: expected one JSON object in UTF-8") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
    return record


def read_jsonl(path):
    """Yields (line number, dict) of a JSON Lines file; raises ValueError naming file and line."""
    for number, line in _lines(path):
        yield number, _parse(path, number, line)


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Opens a temporary file beside path and renames it on success, so that path is never half written."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def run_main(main):
    """Runs a script's main: a user's mistake is one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


CHUNK = 64


def _chunk(chunk, path, seed, labeler):
    """Annotates numbered lines; returns (bytes to write, counts)."""
    stats, out = Counter(), []
    for number, line in chunk:
        record = _parse(path, number, line)
        for key in ("id", "report"):
            if not isinstance(record.get(key), str):
                raise ValueError(f"{path}:{number}: expected a string {key!r}")
        if labeler == "given" and not isinstance(record.get("labels"), dict):
            raise ValueError(f"{path}:{number}: --labeler given expects 'labels'")
        label = label_report if labeler == "rules" else lambda text, given=record.get("labels"): given
        record = annotate(record, seed=seed, label=label, stats=stats)
        _count(record, stats)
        out.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(out).encode(), stats


def _count(record, stats):
    stats["studies"] += 1
    stats["with hard negatives"] += bool(record["hard_negatives"])
    stats.update(f"positive: {c}" for c in positives(record["labels"]))


def _throttled(items, slots):
    """Pool.imap drains its input at once; this holds it back until results are written."""
    for item in items:
        slots.acquire()
        yield item


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("manifest", help="JSON Lines with id and report, from data.py")
    parser.add_argument("--out", required=True, help="JSON Lines to write")
    parser.add_argument("--labeler", choices=("rules", "given"), default="rules", help="who labels: our rules, or the manifest")
    parser.add_argument("--seed", type=int, default=0, help="choice, phrasing and position of the negations")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    from tqdm import tqdm
    began, total = time.time(), Counter()
    slots = threading.Semaphore(8 * max(1, args.workers))
    chunks = itertools.batched(_lines(args.manifest), CHUNK) if hasattr(itertools, "batched") else _batched(_lines(args.manifest), CHUNK)
    work = partial(_chunk, path=args.manifest, seed=args.seed, labeler=args.labeler)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open_atomic(args.out, "wb"))
        bar = stack.enter_context(tqdm(unit="study", disable=not sys.stderr.isatty()))
        pool = stack.enter_context(multiprocessing.Pool(args.workers)) if args.workers > 1 else None
        for data, stats in pool.imap(work, _throttled(chunks, slots)) if pool else map(work, chunks):
            slots.release()
            out.write(data)
            total += stats
            bar.update(stats["studies"])
    _summary(total, time.time() - began)


def _batched(items, size):
    items = iter(items)
    while batch := tuple(itertools.islice(items, size)):
        yield batch


def _summary(total, seconds):
    order = ["studies", "with hard negatives", *(f"positive: {c}" for c in CONDITIONS[:-1])]
    for name in [*order, *sorted(set(total) - set(order))]:
        print(f"{name:45s} {total[name]:9,d}")
    print(f"{'studies per second':45s} {total['studies'] / max(seconds, 1e-9):9,.0f}")


if __name__ == "__main__":
    run_main(main)
