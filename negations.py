"""Labels, clean reports, hard negatives and graphs from chest X-ray reports (Sec. 3, Sec. 4.1, Fig. 2).

    python negations.py IN.jsonl --out OUT.jsonl     (--labeler, --llm, --graphs: see --help)

Fig. 2 as a local pipeline: the report r is split into sentences of one clinical entity without
comparison to priors; its positive conditions are found; for each of them the sentences about it are
removed (r^r, `omit`) and a denial is inserted at the beginning, middle or end (r^n, `negate`). Rules
do all of it. Models that run here may replace the labeler (CheXbert) and the editor (an instruct
model, whose answers the rules check). Labels: 1 present, 0 denied, -1 uncertain.

How the rules label: each sentence is read alone. Phrases of FINDINGS are looked up, some of which
deny or hedge by themselves ("heart size is normal"); on the others TRIGGERS act, within a scope that
ends at words like "but" and at a comma before a new statement. Every edit of a sentence is kept
only if its labels stay the same, so splitting and clean-up cannot change what a report says.

SPDX-License-Identifier: MIT
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

CONDITIONS = (  # CheXbert's order
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices", "No Finding")
OTHER = "Other"  # abnormal, outside the 14: cancels No Finding
PRESENT, DENIED, UNCERTAIN = 1, 0, -1

# ---- phrases: regular expressions separated by ";", where * is any word ending (or beginning);
# "-" before one: it denies the condition by itself, "?": it hedges by itself
HEART = (r"(?:heart|cardiac(?! (?:pace|device|lead|valve|monitor))|cardio-? ?mediastinal|cardiopericardial)"
         r"(?: (?:size|silhouettes?|shadow|contours?|outline)\b)?")
MEDIA = (r"(?:cardio-? ?)?mediastin(?:um|al(?! (?:lymph|node|mass|adeno|clip|fat)))"
         r"(?: (?:silhouettes?|shadow|contours?|structures|width|size)\b)?")
STOP = r"(?!(?:but|with(?! \w+ limits)|without|however|there|although|while|no|clear|opaci\w+|effusions?|which|abnormal|"
GAP = r"(?:[,:]? " + STOP + r"enlarged|widened|prominent|tortuous|borderline)\b)[\w'/-]+){0,9}?[,:]? "
NEAR = r"(?: " + STOP + r"normal|and|pulmonary|lungs?|aort\w+|or|unremarkable)\b)[\w'/-]+){0,5}? "
UPPER = r"(?:(?:upper|top|high)[ -](?:limits? (?:of )?|range of |of )?(?:the )?normal|upper limits?)"  # still normal
FINE = (r"(?:normal|unremarkable|not remarkable|within limits|not (?:\w+ )?(?:enlarged|widened|prominent)|"
        + UPPER + ")")
BIG = r"(?:enlarged|enlargement|prominent|prominence|increased|large|wide|widened|widening)"
FINDINGS = {
    "Enlarged Cardiomediastinum": rf"""?{MEDIA}{GAP}borderline; -{MEDIA}{GAP}{FINE};
        -(?:normal|unremarkable)(?: [\w,/-]+){{0,5}}? {MEDIA}; {MEDIA}{NEAR}{BIG}; {BIG}(?:
        of)?(?: \w+){{0,2}}? {MEDIA}""",
    "Cardiomegaly": rf"""?{HEART}{GAP}borderline; ?borderline(?: \w+){{0,3}}? (?:heart|cardi*);
        -{HEART}{GAP}{FINE}; -{UPPER}(?: \w+){{0,3}}? {HEART}; -(?:normal|unremarkable)(?:
        (?!mediast)[\w,/-]+){{0,4}}? {HEART}; cardiomegaly; (?:cardiac|ventricular) enlargement;
        {BIG}(?: of)?(?: \w+)?(?: \w+)? {HEART}; {HEART}{NEAR}{BIG}""",
    "Lung Opacity": r"""-(?:lungs?|lung (?:fields?|bases|zones|\w+)|hemithora*)(?:
        (?:are|is|remains?|appears?|fields?|\w+ly|
        otherwise|both|well|expanded|and|normally|inflated|aerated)){0,5} clear(?! of); -clear(?:
        \w+)? lungs?; (?:\w+ )?opaci(?:ty|ties|fi*); infiltrat*; air[ -]?space
        (?:disease|process|\w+ disease); haz(?:e|y|iness); ground[ -]glass;
        (?:lung|pulmonary|airspace|increased|patchy|hazy|vague|streaky|ill-defined) densit*""",
    "Lung Lesion": r"""(?:micro)?nodul(?:es?|ar*)(?! (?:infiltr|contour|interst|pattern))(?:
        (?:opacit*|densit*|lesions?))?; mass(?:es)?(?! effect); tumou?rs?; neoplas*; malignan*;
        *carcinomas?; cancers?; metasta*; (?:lung|pulmonary|cavitary|cavitating|focal) lesions?""",
    "Edema": r"(?<!tissue )(?:(?:pulmonary|interstitial|alveolar) ){0,2}o?edema",
    "Consolidation": "consolidat*",
    "Pneumonia": r"""(?:broncho)?pneumoni(?:as?|ae|tis); (?<!granulomatous )(?<!prior )(?<!old
        )(?<!previous )(?<!remote )infecti*(?: process| etiology)?""",
    "Atelectasis": r"atelecta*; (?:lobar|lobe|lung) collapse; collaps* (?:\w+ )?(?:lobe|lung)",
    "Pneumothorax": "(?:hydro)?pneumo-?thora*; ptx",
    "Pleural Effusion": r"""-pleural spaces?(?: \w+)? clear; (?<!pericardial )(?<!joint
        )effusions?; pleural (?:\w+ )?fluid; hydropneumothora*; ha?emothora*""",
    "Pleural Other": r"""pleural(?:[- ]\w+)? (?:thicken*|scar*|plaques?|calcif*|capping|cap);
        thicken* of the (?:\w+ )?pleura; (?:bi)?apical cap*; pleuro-?parenchymal *; fibrothorax""",
    "Fracture": "fractur*",
    "Support Devices": r"""(?:\w+ )?tubes?;
        (?:central|venous|picc|ij|jugular|subclavian|arterial) (?:\w+ )?lines?; *catheters?;
        piccs?; pace-?makers?; port-?a-?cath*; mediport; (?:infusion|chest) port; prosthe*;
        hardware; screws?; stents?; (?:pacer|pacing|icd|aicd|ventricular|monitor*) (?:\w+
        )?(?:leads?|wires?); a?icd; defibrillators?; stimulators?;
        (?:sternal|sternotomy|cerclage) (?:wires?|sutures?); (?:\w+ )?clips?; (?:\w+ )?devices?;
        generators?; balloon pump; (?:prosthetic|mechanical|artificial|bioprosthetic) (?:\w+
        )?valves?; valve (?:replacement|prosthesis); (?:pigtail|chest|pleural) drains?""",
    OTHER: r"""*granulom*; scar(?:s|red|ring)?; *emphysem*; copd; obstructive;
        hyper-?(?:inflat|expan|aerat|lucen)*; fibro(?:sis|tic); hypo-?(?:inflat|aerat|ventil)*;
        *scolio*; *kypho*; curvature; post-?traumatic; spond*; degenerat*; osteophyt*; arthr*;
        spur*; osteo(?:pen|por)*; deminerali*; hernia*; tort[uo]+r?o*; ectat*; ectasia; unfold*;
        uncoil*; *sclero(?:sis|tic); calcif*; aneurysm*; eventrat*; elevat*; volume loss;
        *adenopath*; bronchiectas*; thicken*; congesti*; engorge*;
        (?:low|small|decreased|diminished|reduced) (?:lung )?(?:volumes?|inspir*); volumes?
        (?:are |is )?(?:low|decreased); prominen*; enlarge*; deformit*; dislocat*; cysts?;
        cystic; bull(?:a|ae|ous); blebs?; cavit(?:y|ary|ation); sarcoid*; tubercul*; hyperosto*;
        foreign bod*; blunt*; (?:increased|coarse*|crowd*) (?:\w+ )?(?:\w+ )?markings; crowding;
        flatten*; pectus; lucen*; heart failure; chf; hypertension; pneumoperitone*; free (?:\w+
        )?air; shift*; deviat*; fullness; sternotomy; (?:post-?)?(?:surg|operat)* change*;
        *ectomy; cabg; bypass; effusions?; densit(?:y|ies); lesions?; distort*; retract*; chronic
        \w+ (?:change|disease)*; abnormalit*; injur*; (?:\w+ )?(?:process|disease|findings?)""",
}
# ---- triggers, first match wins. no: denies what follows; denied: what precedes; maybe: hedges what
# follows; hedge: either; ignore: not said of this image; skip: a look-alike; end: of a scope
TRIGGERS = (
    ("hedge", r"""(?:cannot|can not|can't|could not|not|difficult to|hard to)(?: \w+)?
        (?:be )?(?:entirely |completely |definitely )?(?:excluded?|rule out|ruled out);
        (?:is |are )?not (?:entirely |completely )?excluded"""),
    ("skip", r"""(?:no|not|without)(?: \w+){0,2}? (?:changed?|changes (?:in|from|since)|increased?|
        decreased?|difference|worsen*|improve*|progress*)\b(?: in| of)?; no (?:comparison|priors?|previous);
        not (?:only|include*|(?:well |fully |completely )?(?:evaluated|assessed));
        (?:compatible|consistent|associated|in keeping|correlat*|along|together) with;
        (?:not|better)(?: \w+)? (?:seen|visuali[sz]ed|present|noted|apparent|identified|appreciated)
        (?:\w+ )?on (?:the )?(?:\w+ )?(?:prior|previous|lateral|frontal);
        (?:near|nearly|almost|partial|incomplete)[- ](?:\w+ )?(?:resol|clear)*(?: of)?"""),
    ("denied", r"""(?:is|are|was|were|has|have|had)(?: now| since| been| completely){0,3}
        (?:ruled out|excluded|absent|resolved|cleared|removed|gone); ruled out; unlikely;
        (?:not|no longer) (?:\w+ )?(?:seen|visuali[sz]ed|identified|present|evident|noted|
        demonstrated|appreciated|detected|found)"""),
    ("ignore", r"""recommend*; advise*; correlat*; evaluat* (?:for|of|to); assess* (?:for|of); sensitive;
        obscur*; history of; h/o; please note; to identify; look for; follow-?up; f/u"""),
    ("no", r"""(?:negative|free|clear) (?:for|of|from); no longer; rather than; instead of; resolved; no;
        (?:interval |complete )?(?:removal|resolution|clearing|absence) of; not; without; w/o; never;
        neither; nor; denies; absent; non"""),
    ("hedge", r"""(?:is |are )?(?:also |again )?(?:suspected|questioned|possible|considered|favou?red)(?=\W{0,9}$);
        (?:is|are) (?:possible|suspected|questioned|considered|likely|probable|in the differential)"""),
    ("maybe", r"""(?:may|might|could)(?: also| well)?(?: be)?(?: (?:secondary|due|related) to)?; possibl[ey];
        probabl[ey]; likely; suspect*; suspicious; concern*; question*; consider*; suggest*; perhaps;
        potential*; worrisome; presum*; doubt*; rule out; exclude; versus; vs; differential; equivocal;
        apparent; borderline; if"""),
    ("end", r"""but; however; although; though; except; aside from; other than; otherwise; apart from;
        which; secondary to; because; while; whereas; yet; [\x3b:]; ,? with"""),
    ("end", r"""(?:,|and)(?= (?:the|there|stable|heart|lungs?|cardi*|mediast*|is|are|possibl[ey]|
        probabl[ey]|likely|may|with|consistent|compatible|unchanged|status|again|which|however|
        visuali*|limited)\b)"""),
    ("end", r"""(?:,|and)(?= (?:a|an|mild*|moderate*|minimal*|marked*|severe*|small|large|tortuous|
        degenerative|normal|low|prominent|calcified|chronic|old|healed|bilateral|left|right|multiple|
        hyper*) (?![^.\x3b]{0,200}\b(?:or|nor)\b))"""),  # "no opacity, large effusion or mass" is one list
)


def _phrases(table):
    """A table's regular expressions: separated by ";", line breaks a blank (nothing after "|"), * is \\w*."""
    flat = (" ".join(p.split()) for p in re.sub(r"\|\n\s+", "|", table).split(";"))
    return [p.replace("*", r"\w*") for p in flat if p]


def _compile(name, table):
    """(stems, pattern): a word without any of the stems cannot belong to a match, which spares searches."""
    phrases, groups = _phrases(table), []
    for kind, sign in (("hedge", "?"), ("deny", "-"), ("affirm", "")):
        own = [p[len(sign):] + r"(?!\w)" for p in phrases if (p[0] if p[0] in "?-" else "") == sign]
        groups += [f"(?P<{kind}>{'|'.join(own)})"] if own else []
    literal = re.sub(r"\\.|\[[^]]*\]|\w\?|\(\?:[^()]*\)\?", " ", " ".join(phrases))
    fixed = {"Cardiomegaly": {"heart", "card"}, "Enlarged Cardiomediastinum": {"mediast"}}
    stems = fixed.get(name) or set(re.findall(r"[a-z]{3,}", literal))
    return re.compile("|".join(sorted(stems))), re.compile(rf"\b(?:{'|'.join(groups)})")


_FINDINGS = {name: _compile(name, table) for name, table in FINDINGS.items()}
_TRIGGERS = re.compile(r"\b(?:" + "|".join(
    f"(?P<{kind}_{i}>{'|'.join(_phrases(table))})(?!\w)" for i, (kind, table) in enumerate(TRIGGERS)) + ")")
_OR = re.compile(r"\b(?:versus|vs|and/or|or)\b")


@lru_cache(1 << 15)
def _candidates(word):
    return frozenset(name for name, (stems, _) in _FINDINGS.items() if stems.search(word))


def _scope(triggers, start, end):
    """1, 0, -1 or None (nothing said) of a finding: triggers before it back to a scope's end, then after it."""
    value = PRESENT
    for kind, first, last in reversed(triggers):
        if first >= end or (last > start and kind == "end"):
            continue
        if kind in ("end", "ignore", "no"):
            if kind != "end":
                return DENIED if kind == "no" else None
            break
        if kind in ("maybe", "hedge"):
            value = UNCERTAIN
    for kind, first, _ in triggers:
        if first >= end and kind in ("end", "denied"):
            return DENIED if kind == "denied" else value
        if first >= end and kind == "hedge":
            value = UNCERTAIN
    return value


def mentions(sentence):
    """All findings of one sentence by position: (condition or "Other", 1 | 0 | -1, start, end)."""
    lower = sentence.lower()
    if len(lower) != len(sentence):  # a few capitals grow when lowered, and would move the offsets
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in sentence)
    return _mentions(lower.rstrip(" ."))


@lru_cache(1 << 15)
def _mentions(lower):
    found, triggers = [], None
    candidates = frozenset().union(*map(_candidates, lower.split()))
    for name in (name for name in _FINDINGS if name in candidates):
        for m in _FINDINGS[name][1].finditer(lower):
            if name == OTHER and any(s < m.end() and m.start() < e for _, _, s, e in found):
                continue
            value = {"hedge": UNCERTAIN, "deny": DENIED}.get(m.lastgroup)
            if value is None:
                if triggers is None:
                    triggers = [(t.lastgroup.split("_")[0], *t.span()) for t in _TRIGGERS.finditer(lower)]
                value = _scope(triggers, *m.span())
            if value is not None:
                found.append((name, value, *m.span()))
    found.sort(key=lambda m: m[2:])
    said = [m for m in found if m[1] != DENIED]
    unsure = {m for a, b in itertools.pairwise(said) for m in (a, b)  # "A or B", "A versus B"
              if a[0] != b[0] and "," not in lower[a[3]:b[2]] and _OR.search(lower, a[3], b[2])}
    return tuple((m[0], UNCERTAIN, *m[2:]) if m in unsure else m for m in found)


def _merge(pairs):
    """Each condition's value over its mentions: present beats uncertain beats denied."""
    labels = {}
    for name, value in pairs:
        if value == PRESENT or not labels.get(name):
            labels[name] = value
    return labels


def _labels_of(sentence):
    return _merge(m[:2] for m in mentions(sentence))


def _said(sentences):
    return _merge(pair for s in sentences for pair in _labels_of(s).items())


def label_report(text):
    """CheXpert labels of a report by rules: {condition: 1 | 0 | -1}, absent = not mentioned.

    No Finding is 1 if a text is there and no abnormality, inside or outside the 14, is present or
    uncertain in it (support devices aside); it is never 0.
    """
    sentences = _sentences(text)
    labels = _said(sentences)
    normal = sentences and not any(v for c, v in labels.items() if c != "Support Devices")
    return {c: labels[c] for c in CONDITIONS if c in labels} | ({"No Finding": 1} if normal else {})


def positives(labels):
    """Names among the 13 conditions besides No Finding whose value is 1, in CheXbert's order."""
    return [c for c in CONDITIONS[:-1] if labels.get(c) == 1]


# ---- words that modify, for noun phrases and graphs
SIDES = frozenset("left right bilateral bilaterally both".split())
PLACES = SIDES | frozenset("""bibasilar biapical basilar basal apical lower upper middle mid
        midlung lingular retrocardiac perihilar hilar peripheral central medial lateral anterior
        posterior thoracic lumbar cervical subclavian jugular cardiac mediastinal pleural
        pulmonary lung lungs lobe lobes base bases apex apices hilum hila heart silhouette
        silhouettes mediastinum aorta aortic trachea diaphragm hemidiaphragm hemidiaphragms rib
        ribs spine clavicle pleura lingula svc atrium ventricle stomach humerus shoulder sternum
        vertebra vertebrae vertebral cardiomediastinal contour contours vasculature vascularity
        angle angles sulcus zone zones bones osseous structures hemithorax thorax chest abdomen
        fissure vessels artery arteries vein interstitium bronchi carina cardiopulmonary bony
        skeletal soft tissues airways field fields""".split())
GRADES = frozenset("""mild mildly moderate moderately severe severely minimal minimally marked
        markedly trace tiny small large massive subtle slight slightly patchy focal diffuse
        multifocal scattered streaky linear hazy dense ill-defined acute chronic subsegmental
        segmental platelike discoid interstitial alveolar airspace calcified displaced
        nondisplaced healed old compression multiple few several early extensive faint vague
        loculated layering nodular coarse reticular bullous bandlike confluent active significant
        definite mixed round rounded cm mm""".split())
STATES = frozenset("normal clear unremarkable intact midline expanded inflated aerated".split())
_WORD = re.compile(r"[\w'/.-]*\w")
_TAIL = re.compile(r" (?:in|of|at|within|involving|overlying)(?: the)?(?: [\w-]+){0,3}? (?:%s)\b"
                   % "|".join(sorted(PLACES)), re.I)


def _noun_phrase(sentence, mention):
    """The finding with the side, grade and place words around it: "small left effusion"."""
    start, end = mention[2:]
    for word in reversed(list(_WORD.finditer(sentence, 0, start))):
        if word[0].lower() not in PLACES | GRADES or sentence[word.end():start].strip():
            break
        start = word.start()
    tail = _TAIL.match(sentence, end)
    return sentence[start:tail.end() if tail else end]


# ---- sentences of one entity, without time (Sec. 3; Fig. 2 step i)
_BREAK = re.compile(r"(?<=[.!?])(?<!\bDr\.)(?<!\bvs\.)\s+|(?<=[a-z]{2}[.])(?=[A-Z])|(?<=;)\s+|"
                    r"\s(?=\d{1,2}[.)] [A-Z])")
_NUMBER = re.compile(r"^\W*(?:\d{1,2}[.)](?!\d)\s*)?(?:(?:findings|impression|chest|conclusion)\s*:\s*)?", re.I)
_CUT = re.compile(r",?\s+(?:and/or|and|or|nor|versus|vs\.?|with|but|however|although|while|as well as)\b,?\s+|"
                  r"[,;]\s+|,?\s+(?=without\b)")
_PLACE_LIST = re.compile(  # "heart size and mediastinal contours are normal"
    r"^(?P<lead>(?:the |both |normal |unremarkable )*)(?P<items>[\w\s,/-]+?,? and (?:the )?[\w\s-]+?)"
    r"(?P<tail>\s(?:are|is|appears?|remains?|within|grossly|normal|unremarkable|clear)\b[^,;]*)?$", re.I)
_ADJECTIVE = re.compile(r"(?:cardiac|mediastinal|hilar|pulmonary|pleural|osseous|bony|cardiomediastinal)$", re.I)
_THE = r"(?: (?:the|a|an|his|her|most|that|of|recent|immediate)){0,4}"
_STUDY = r"""(?: (?:prior|previous|earlier|comparison|recent|old|last|outside|preceding|chest|exam*|images?|
    stud(?:y|ies)|radiographs?|films?|x-?rays?|ct|scans?|xxxx|from|dated|of|on|performed|\d[\d/]{0,9})){1,8}"""
TIME = rf"""(?:when |as )?(?:compar(?:ed|ing|ison)|in comparison|relative|similar(?: in appearance)?|unchanged|
    stable|change[ds]?|differ*)(?: *ly)? (?:to|with|from|since){_THE}(?: \w+)?{_STUDY};
    (?:seen |noted |present )?(?:since|from|than|on|as on|as of){_THE} (?:prior|previous|last|earlier|
    preceding|comparison){_STUDY}; (?:since|from|than|on)(?: the| a)? (?:prior|previous|last|comparison);
    (?:as|similar to) before; (?:in|over|during|for) the interval; in the interim;
    (?:similar|stable|unchanged) (?:in )?appearance of(?: the)?; redemonstrat(?:ed|ion of); persists?;
    (?:no|without)(?: \w+)?(?: \w+)? (?:changes?|progression|improvement|worsening|increase|decrease)(?:
    (?:in|of)(?: the)?(?: (?:size|appearance|position)(?: of)?(?: the)?)?|(?=$|[,.]| since| from| compared));
    interval (?:development|appearance|increase|decrease|worsening|improvement|progression|placement|
    enlargement|change)s?(?: (?:of|in))?(?: the)?; (?:not |no )?(?:significantly |essentially |relatively |
    grossly |overall )?(?:unchanged|changed|stable)(?: in (?:appearance|size|position|configuration))?;
    (?:slightly |mildly |significantly |markedly |further )?(?:worsen(?:ed|ing)|improv(?:ed|ing)|resolving|
    enlarging|persistent(?:ly)?|recurrent|residual|interval(?:ly)?); (?:has|have|is|are) (?:slightly |
    significantly |mildly )?(?:increased|decreased|progressed|developed)(?: in (?:size|number|extent))?;
    (?:again|previously|newly|now)(?: (?:seen|noted|demonstrated|identified|visuali[sz]ed|described|is|
    are)){{0,2}}; new(?! york)"""
_TIME = ((re.compile(r"\bremains?\b", re.I), "is"),
         (re.compile(rf"\b(?:{'|'.join(_phrases(TIME))})(?!\w)", re.I), " "))
_GONE = re.compile(r"\b(?:removal|resolution|clearing) of|\bha(?:s|ve|d) (?:been |since )*(?:removed|resolved|"
                   r"cleared)|\bno longer\b", re.I)
_TIME_WORD = re.compile(r"compar|relative|similar|chang|stabl|differ|since|prior|previous|last|earlier|preced|inter|"
                        r"progress|worsen|improv|increas|decreas|enlarging|persist|recurr|residual|resol|clear|"
                        r"remov|develop|redemonst|again|new|now|remain|no longer", re.I)
_HEAD = re.compile(r"^(?:(?:and|but|or|which|is|are|of|in|however|otherwise)\b\W*|\W+)+(?=\S)", re.I)
_REST = re.compile(r"(?:\b(?:is|are|has|have|been|appears?|there|to|be|and|but|with|of|in|or|also)\W*)+$|"
                   r"\s+(?=[,.;])|,\s*(?=[,.;]|$)", re.I)
_EMPTY = frozenset("""the a an is are was of in there chest exam examination study studies
        appearance finding findings xxxx this these it and or with to no not has have been from
        by comparison compared prior previous available none interval change changes changed
        otherwise overall radiograph radiographs film films x-ray as on at for made significant
        significantly view views also appear appears size shape configuration""".split())


@lru_cache(1 << 13)
def _sentences(text):
    parts = (_NUMBER.sub("", part).strip() for part in _BREAK.split(" ".join(text.split())))
    return tuple(part for part in parts if _WORD.search(part))


def _finish(piece):
    piece = piece.strip(" ,;:-.")
    return piece[:1].upper() + piece[1:] + "." if piece else ""


@lru_cache(1 << 15)
def _split(sentence):
    """One entity a sentence where a list or a conjunction can be cut without changing any label."""
    for cut in (_cut_places, _cut_findings):
        pieces = cut(sentence)
        if len(pieces) > 1 and _said(pieces) == _labels_of(sentence):
            return tuple(p for piece in pieces for p in _split(piece))
    return (_finish(sentence),)


def _cut_places(sentence):
    match = _PLACE_LIST.match(sentence.strip(" ."))
    if not match or not (match["tail"] or re.search("normal|unremark", match["lead"], re.I)):
        return ()
    items = [i.removeprefix("the ") for i in re.split(r",\s*(?:and\s+)?|\s+and\s+", match["items"].strip()) if i]
    if any(len(i.split()) > 4 or re.search(r"\b(?:is|are|no|without|with|of)\b", i) for i in items):
        return ()
    head, tail = items[-1].split()[-1], match["tail"] or ""
    items = [f"{i} {head}" if _ADJECTIVE.search(i) else i for i in items]
    one = re.sub(r"^(\s)(?:are|appear)\b", lambda m: " is" if m[0] == " are" else " appears", tail)
    return tuple(_finish(f"{match['lead']}{i}{tail if re.search(r'[^su]s$', i) else one}") for i in items)


def _cut_findings(sentence):
    found, pieces, begin = mentions(sentence), [], 0
    for a, b in itertools.pairwise(found):
        cut = _CUT.search(sentence, a[3], b[2] + 1)
        if cut and cut.start() > begin and cut.end() <= b[2]:
            pieces.append((begin, cut.start()))
            begin = cut.end()
    out = []
    for start, end in [*pieces, (begin, len(sentence))]:
        values = {m[1] for m in found if start <= m[2] < end}
        piece = re.sub(r"^without\b", "no", sentence[start:end].strip(" ,;."))
        if len(values) == 1 and values != {m[1] for m in mentions(piece)}:  # the trigger stood in another piece
            piece = {DENIED: "No ", UNCERTAIN: "Possible ", PRESENT: ""}[min(values)] + piece[:1].lower() + piece[1:]
        out.append(_finish(piece))
    return tuple(out)


@lru_cache(1 << 15)
def _timeless(sentence):
    """The sentence without comparison to priors; "" if nothing else was said."""
    text, found = sentence, mentions(sentence)
    if _TIME_WORD.search(text):
        if _GONE.search(text) and any(m[1] == DENIED for m in found):
            text = " ".join(("No " if m[1] == DENIED else "") + _noun_phrase(text, m) + "." for m in found)
        for pattern, to in _TIME:
            text = " ".join(pattern.sub(to, text).split())
    if text != sentence:
        text = " ".join(_finish(_HEAD.sub("", _REST.sub("", t.strip(" ,;.")))) for t in _sentences(text))
    said = {w.lower() for w in _WORD.findall(text) if not w.isdigit()} - _EMPTY
    if not found and not (said - PLACES if text != sentence else said):
        return ""
    if _said(_sentences(text)) == _labels_of(sentence):
        return text
    pieces = _split(sentence)
    return " ".join(filter(None, map(_timeless, pieces))) if len(pieces) > 1 else sentence


def split_sentences(text):
    """Sentences of one clinical entity each, where rules can cut lists and conjunctions (Sec. 3)."""
    return [piece for sentence in _sentences(text) for piece in _split(sentence)]


def remove_temporal(text):
    """The report without comparison to prior examinations; findings and labels stay (Sec. 3)."""
    return " ".join(filter(None, map(_timeless, _sentences(text))))


def clean(text):
    """The cleaned report r as a list of sentences: one entity each, no comparison to priors (Fig. 2, i)."""
    return split_sentences(remove_temporal(text))


# ---- omission and negation (Sec. 3, Sec. 4.1; Fig. 2 step ii)
NOUNS = {  # how a condition is denied: nouns for the templates; what starts with a capital is a sentence
    "Enlarged Cardiomediastinum": ("mediastinal widening", "mediastinal enlargement", "The mediastinum is normal in width."),
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement", "The heart is normal in size.",
                     "Heart size is within normal limits."),
    "Lung Opacity": ("pulmonary opacity", "airspace opacity", "lung infiltrate"),
    "Lung Lesion": ("pulmonary nodule", "lung mass", "pulmonary nodule or mass"),
    "Edema": ("pulmonary edema", "edema"),
    "Consolidation": ("consolidation", "focal consolidation"),
    "Pneumonia": ("pneumonia",),
    "Atelectasis": ("atelectasis",),
    "Pneumothorax": ("pneumothorax",),
    "Pleural Effusion": ("pleural effusion", "pleural fluid"),
    "Pleural Other": ("pleural thickening",),
    "Fracture": ("fracture", "displaced fracture"),
    "Support Devices": ("support device", "catheter or tube"),
}
TEMPLATES = ("No {}.", "There is no {}.", "No evidence of {}.", "No {} is seen.", "Negative for {}.")
# ASSUMPTION: where omission leaves nothing, r^r is this sentence, which names no finding, as an empty text means nothing.
NOTHING_LEFT = "Frontal chest radiograph."


@lru_cache(1 << 15)
def _omit(sentence, condition):
    """The sentences that remain without the condition: other findings in it are kept as noun phrases."""
    found = mentions(sentence)
    if all(m[0] != condition for m in found):
        return (sentence,)
    kept = []
    for name, value in _labels_of(sentence).items():
        m = next(m for m in found if m[:2] == (name, value))
        lead = {PRESENT: "", DENIED: "No ", UNCERTAIN: "Possible "}[value]
        phrases = (_noun_phrase(sentence, m), sentence[m[2]:m[3]], *NOUNS.get(name, ())[:1])
        choices = [] if name == condition or (name == OTHER and not value) else [_finish(lead + p) for p in phrases]
        kept += [c for c in choices if _labels_of(c).get(name) == value and condition not in _labels_of(c)][:1]
    return tuple(kept)


def _omitted(sentences, condition):
    return [t for s in sentences for t in _omit(s, condition)]


def _insert(rest, condition, rng):
    """A denial put into the remaining sentences: (r^n, position). What a short report lacks is not drawn."""
    words = NOUNS[condition]
    word = rng.choice(words)
    denial = word if word[0].isupper() else rng.choice(TEMPLATES).format(word)
    position = rng.choice(("beginning", "end", "middle")[:min(len(rest), 2) + (len(rest) > 1)] or ("beginning",))
    at = {"beginning": 0, "end": len(rest)}.get(position) if position != "middle" else rng.randrange(1, len(rest))
    return " ".join([*rest[:at], denial, *rest[at:]]), position


def omit(text, condition):
    """r^r: the report without the sentences about the condition, affirmed or denied (Sec. 3)."""
    return " ".join(_omitted(split_sentences(text), condition)) or NOTHING_LEFT


def negate(text, condition, rng):
    """(r^r, r^n) of a cleaned report: the condition omitted, and denied at a random position (Sec. 3, Fig. 2).

    condition: one of the 13 besides No Finding. rng: random.Random, draws phrasing and position.
    """
    if condition not in NOUNS:
        raise ValueError(f"cannot negate {condition!r}: expected one of {', '.join(NOUNS)}")
    rest = _omitted(split_sentences(text), condition)
    return " ".join(rest) or NOTHING_LEFT, _insert(rest, condition, rng)[0]


def _negated_labels(labels, condition, rest):
    """r's labels with the condition at 0; No Finding is 1 if no abnormality remains (devices aside)."""
    out = {c: v for c, v in labels.items() if c != "No Finding"} | {condition: DENIED}
    abnormal = any(v for c, v in out.items() if c != "Support Devices") or any(
        m[0] == OTHER and m[1] for s in rest for m in mentions(s))
    return {c: out[c] for c in CONDITIONS if c in out} | ({} if abnormal else {"No Finding": 1})


# ---- graphs in RadGraph's schema (Sec. 4.3)
_TOKEN = re.compile(r"\d+\.\d+|[\w'/-]+|[^\w\s]")
_LEADS_TO = re.compile(r"suggest|represent|consistent|compatible|reflect|concern|due to|secondary to", re.I)
_LABEL = {PRESENT: "OBS-DP", DENIED: "OBS-DA", UNCERTAIN: "OBS-U"}
_FUNCTION = frozenset("the a an is are was were of in at to with and or not within no size appears on for".split())


def _nodes(sentence):
    """(tokens, nodes) of one sentence; a node is [kind, value, index of its finding, first token, last token]."""
    found, tokens, nodes = mentions(sentence), [], []
    for i, m in enumerate(_TOKEN.finditer(sentence)):
        word = m[0].lower()
        at = next((k for k, f in enumerate(found) if f[2] <= m.start() < f[3]), None)
        kind = ("anatomy" if word in PLACES else "grade" if word in GRADES else "finding" if word in STATES
                or (at is not None and word[0].isalpha() and word not in _FUNCTION) else None)
        value = PRESENT if at is None or word in STATES else found[at][1]
        if kind == "finding" and nodes and nodes[-1][:3] == [kind, value, at] and nodes[-1][4] == i - 1:
            nodes[-1][4] = i
        elif kind:
            nodes.append([kind, value, at, i, i])
        tokens.append(m[0])
    return tokens, nodes


@lru_cache(1 << 13)
def _sentence_graph(sentence):
    """(tokens, [(first token, last token, label, [(relation, index of the target)])]) of one sentence."""
    tokens, nodes = _nodes(sentence)
    of = {kind: [i for i, n in enumerate(nodes) if n[0] == kind] for kind in ("anatomy", "grade", "finding")}
    arrow, out, partial = _LEADS_TO.search(sentence), [], set()
    middle = len(_TOKEN.findall(sentence[:arrow.start()])) if arrow else -1
    for i in of["anatomy"]:  # "left lower lobe": each word modifies the next; "left effusion": the finding
        after = nodes[i + 1][0] if i + 1 < len(nodes) and nodes[i + 1][3] == nodes[i][4] + 1 else None
        if after == "anatomy" or (after and tokens[nodes[i][3]].lower() in SIDES):
            partial.add(i)
    for i, (kind, value, _, first, last) in enumerate(nodes):
        heads = {"anatomy": [i + 1] if i in partial and i + 1 in of["anatomy"] else of["finding"] * (i in partial),
                 "grade": of["finding"] or of["anatomy"],
                 "finding": [a for a in of["anatomy"] if a not in partial]}[kind]
        relations = []
        if heads:  # what modifies stands before its head more often than after it
            near = min(heads, key=lambda h: (abs(h - i) + 3 * (h < i and kind != "finding"), h))
            relations = [("located_at" if kind == "finding" else "modify", near)]
            value = nodes[near][1] if kind == "grade" else value
        later = [f for f in of["finding"] if nodes[f][3] > middle]
        if kind == "finding" and last < middle and later:
            relations.append(("suggestive_of", later[0]))
        out.append((first, last, "ANAT-DP" if kind == "anatomy" else _LABEL[value], relations))
    return tokens, out


def rule_graph(sentences):
    """A RadGraph record by rule: anatomy and observations (present, absent, uncertain) and their relations."""
    text, entities = [], {}
    for tokens, nodes in map(_sentence_graph, sentences):
        at, base = len(text), len(entities) + 1
        for i, (first, last, label, relations) in enumerate(nodes):
            entities[str(base + i)] = {
                "tokens": " ".join(tokens[first:last + 1]), "label": label, "start_ix": at + first,
                "end_ix": at + last, "relations": [[name, str(base + to)] for name, to in relations]}
        text += tokens
    return {"text": " ".join(text), "entities": entities, "data_source": "rules"}


def _tokens_about(text, condition):
    hit, at = set(), 0  # at: index of the sentence's first token
    for sentence in re.split(r"(?<= [.;]) ", text):
        for _, _, start, end in (m for m in mentions(sentence) if m[0] == condition):
            hit.update(range(at + sentence.count(" ", 0, start), at + sentence.count(" ", 0, end - 1) + 1))
        at += sentence.count(" ") + 1
    return hit


def negated_graph(graph, condition):
    """r^n's record: r's without the entities of the condition, and with one absent observation of it added."""
    entities, hit = graph["entities"], _tokens_about(graph["text"], condition)
    gone = {k for k, e in entities.items() if not e["label"].upper().startswith("ANAT")
            and not hit.isdisjoint(range(e["start_ix"], e["end_ix"] + 1))}
    to = {k: {t for _, t in e["relations"]} for k, e in entities.items()}
    back = {k: {j for j in to if k in to[j]} for k in entities} if gone else {}
    fresh = gone
    while fresh:  # what only modified or located a removed entity goes with it
        near = set().union(*(to[k] | back[k] for k in fresh)) & set(entities) - gone
        fresh = {k for k in near if to[k] <= gone and (to[k] or back[k] <= gone)}
        gone = gone | fresh
    kept = {k: e | {"relations": [r for r in e["relations"] if r[1] not in gone]}
            for k, e in entities.items() if k not in gone}
    noun = NOUNS[condition][0]
    style = "Observation::definitely absent" if any("::" in e["label"] for e in entities.values()) else "OBS-DA"
    first = graph["text"].count(" ") + 2 if graph["text"] else 1
    kept[str(max(map(int, entities), default=0) + 1)] = {
        "tokens": noun, "label": style, "start_ix": first, "end_ix": first + noun.count(" "), "relations": []}
    return graph | {"text": f"{graph['text']} no {noun} .".strip(), "entities": kept}


class GraphFile:
    """RadGraph's JSON file, records read on demand: PhysioNet's keys (studies), the package's (lines of IN).

    ASSUMPTION: the file describes the report before clean-up; its graph is taken as that of the cleaned one.
    """
    _RECORD = re.compile(rb'"([^"\\]+)"\s*:\s*(?=\{\s*"(?:text|entities|data_source|data_split)"\s*:)')
    _STUDY = re.compile(r"(?<![\w])s(\d{8})(?!\w)")

    def __init__(self, path):
        self.path, self.at = path, {}  # key -> where its record starts in the file
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for m in self._RECORD.finditer(data):
                key = m[1].decode("utf-8", "replace")
                study = self._STUDY.search(key)
                self.at[study[0] if study else key] = m.end()
        if not self.at:
            raise ValueError(f"{path}: expected RadGraph's JSON object of records with text and entities")
        self.ends = dict(itertools.pairwise(sorted(self.at.values())))

    def get(self, record, number):
        """The graph of a record of the manifest, at this line; None if the file has none."""
        study = self._STUDY.search(f"s{record.get('study', '')} {record.get('image', '')} {record['id']}")
        at = self.at.get(study[0] if study else "") or self.at.get(str(number - 1))
        if at is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(at)
            text = file.read(self.ends[at] - at if at in self.ends else -1).decode("utf-8", "replace")
        try:
            graph = json.JSONDecoder().raw_decode(text)[0]
            if isinstance(graph["text"], str) and all(e["label"] and e["tokens"] for e in graph["entities"].values()):
                return graph
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ValueError(f"{self.path}: expected a RadGraph record at byte {at}")


# ---- models that the user may have; they run on this machine
class CheXbert:
    """The published CheXbert labeler: BERT-base, a head of 4 classes for 13 conditions, of 2 for No Finding.

    checkpoint: its chexbert.pth, where nothing may be missing or unknown. The tokenizer of
    bert-base-uncased is taken from the checkpoint's folder (vocab.txt), else from the hub's cache.
    Raises ValueError if either cannot be had. Called with texts, it returns one dict of labels each.
    """
    def __init__(self, checkpoint, batch_size=32):
        import pickle

        import torch
        from transformers import BertConfig, BertModel, BertTokenizer
        folder, bert = Path(checkpoint).parent, "bert."
        try:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            state = {k.removeprefix("module."): v for k, v in saved.get("model_state_dict", saved).items()}
            state = {k: v for k, v in state.items() if not k.endswith(".position_ids")}
            words, width = state[bert + "embeddings.word_embeddings.weight"].shape
            config = BertConfig(
                vocab_size=words, hidden_size=width, num_attention_heads=max(1, width // 64),
                num_hidden_layers=len({k.split(".")[3] for k in state if k.startswith(bert + "encoder.layer.")}),
                intermediate_size=len(state[bert + "encoder.layer.0.intermediate.dense.bias"]),
                max_position_embeddings=len(state[bert + "embeddings.position_embeddings.weight"]))
            heads = torch.nn.ModuleList(torch.nn.Linear(width, 4) for _ in CONDITIONS[:-1])
            self.net = torch.nn.ModuleDict({"bert": BertModel(config), "linear_heads": heads})
            heads.append(torch.nn.Linear(width, 2))
            self.net.load_state_dict(state)
        except (KeyError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{checkpoint}: expected CheXbert's weights ({reason})") from None
        try:
            source = folder if (folder / "vocab.txt").is_file() else "bert-base-uncased"
            self.tokenizer = BertTokenizer.from_pretrained(source, do_lower_case=True)
        except (OSError, ValueError):
            raise ValueError(f"no tokenizer: put bert-base-uncased's vocab.txt into {folder}, or go online") from None
        self.device, self.batch_size = torch.device("cuda" if torch.cuda.is_available() else "cpu"), batch_size
        self.net.eval().to(self.device)

    def __call__(self, texts):
        import torch
        out, order = [None] * len(texts), sorted(range(len(texts)), key=lambda i: len(texts[i]))
        most = min(512, self.net["bert"].config.max_position_embeddings)
        for at in range(0, len(order), self.batch_size):
            rows = order[at:at + self.batch_size]
            tokens = self.tokenizer([" ".join(texts[i].split()) for i in rows], padding=True, truncation=True,
                                    max_length=most, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                cls = self.net["bert"](**tokens).last_hidden_state[:, 0]  # (B, D)
                classes = [head(cls).argmax(1).tolist() for head in self.net["linear_heads"]]  # 14 x B
            for i, row in zip(rows, zip(*classes, strict=True), strict=True):  # 0 blank, 1, 2, 3
                out[i] = {c: (None, 1, 0, -1)[k] for c, k in zip(CONDITIONS, row, strict=True) if k}
        return out


def local_model(name, batch_size=8):
    """Returns generate(prompts) -> answers of a local instruct model (folder or hub id), greedy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval().to(device)
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: expected an instruct model, whose tokenizer has a chat template")

    def generate(prompts):
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False,
                                               add_generation_prompt=True) for p in prompts]
        answers = []
        for at in range(0, len(chats), batch_size):
            tokens = tokenizer(chats[at:at + batch_size], padding=True, add_special_tokens=False,
                               return_tensors="pt").to(device)
            with torch.inference_mode():
                ids = model.generate(**tokens, do_sample=False, max_new_tokens=400,
                                     pad_token_id=tokenizer.pad_token_id)
            answers += tokenizer.batch_decode(ids[:, tokens["input_ids"].shape[1]:], skip_special_tokens=True)
        return answers
    return generate


CLEAN_PROMPT = """Rewrite this chest X-ray report. Each sentence states exactly one finding, device or denied \
finding. Leave out every comparison with earlier examinations (words such as stable, new, improved), but keep \
the finding itself. Add nothing. Answer with the sentences alone, one a line.

Report: {}"""
OMIT_PROMPT = """Delete from this chest X-ray report whatever concerns "{}", whether it is stated or denied. \
Copy all other sentences unchanged. Answer with the remaining sentences alone, one a line.

Report: {}"""


def _edited(generate, prompts, sources, drafts, stats, step):
    """The model's sentences where the rules agree with their labels and no new word of place, grade or number
    appears; the rules' own draft elsewhere."""
    out = []
    for answer, source, draft in zip(generate(prompts), sources, drafts, strict=True):
        lines = [_finish(re.sub(r"^[\s*-]+", "", line)) for line in answer.splitlines()]
        sentences = [s for line in lines for s in _sentences(line)]
        words, known = ({w for w in _WORD.findall(t.lower()) if w in PLACES | GRADES or w[0].isdigit()}
                        for t in (" ".join(sentences), source))
        good = sentences and words <= known and _said(sentences) == _said(draft)
        out.append(sentences if good else draft)
        stats[f"{step}: {'by the model' if good else 'fell back to the rules'}"] += 1
    return out


# ---- records and files
def annotate(record, *, seed=0, label=label_report, graph=None):
    """The whole rules pipeline for one manifest record; pure, deterministic in (seed, record["id"]).

    label: cleaned text -> labels. graph: r's RadGraph record; else the record's own, else one by rule.
    Returns the record with report (cleaned), original_report, labels, graph and hard_negatives, where the
    first is CXR-Align's choice (Sec. 3) and a condition that the rules do not find in the text has none.
    """
    return _annotate([record], seed, lambda records, texts: [label(t) for t in texts], [graph], None, Counter())[0]


def _annotate(records, seed, label, graphs, generate, stats):
    originals = [r.get("original_report", r["report"]) for r in records]
    cleaned = [clean(t) for t in originals]
    if generate:
        prompts = [CLEAN_PROMPT.format(t) for t in originals]
        cleaned = _edited(generate, prompts, originals, cleaned, stats, "clean-up")
    texts = [" ".join(sentences) for sentences in cleaned]
    labels = label(records, texts)
    rngs = [random.Random(f"{seed}/{r['id']}") for r in records]
    jobs = [(i, c) for i, found in enumerate(map(positives, labels)) for c in rngs[i].sample(found, len(found))]
    rests = [_omitted(cleaned[i], c) for i, c in jobs]
    if generate:
        prompts = [OMIT_PROMPT.format(c, texts[i]) for i, c in jobs]
        rests = _edited(generate, prompts, [texts[i] for i, _ in jobs], rests, stats, "omission")
    out = []
    for record, original, sentences, text, graph in zip(records, originals, cleaned, texts, graphs, strict=True):
        own = record.get("graph")
        graph = graph or (own if own and own.get("data_source") != "rules" else rule_graph(sentences))
        out.append(record | {"report": text, "original_report": original, "labels": labels[len(out)],
                             "graph": graph, "hard_negatives": []})
    for (i, condition), rest in zip(jobs, rests, strict=True):
        if rest == cleaned[i]:
            stats["skipped: positive condition not found in the text"] += 1
            continue
        report, position = _insert(rest, condition, rngs[i])
        out[i]["hard_negatives"].append({
            "condition": condition, "omitted": " ".join(rest) or NOTHING_LEFT, "report": report,
            "position": position, "labels": _negated_labels(labels[i], condition, rest),
            "graph": negated_graph(out[i]["graph"], condition)})
    return out


def _lines(path):
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _parse(path, number, line):
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except ValueError:  # whose message would show the report
        raise ValueError(f"{path}:{number}: expected one JSON object in UTF-8") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
    return record


def read_jsonl(path):
    """Yields (line number, dict) of a JSON Lines file, blank lines skipped; ValueError names file and line."""
    for number, line in _lines(path):
        yield number, _parse(path, number, line)


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Opens a temporary file beside path and renames it at the end, so that path is never half written."""
    handle, name = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
    try:
        with open(handle, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
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
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


_TOOLS = {}  # of this process: path, seed, and what labels, edits and gives graphs


def _start(tools, worker=False):
    _TOOLS.update(tools)
    if worker:  # Ctrl-C is the main process's to handle
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _given(path, number, record):
    labels = record.get("labels")
    if not isinstance(labels, dict) or any(c not in CONDITIONS or v not in (1, 0, -1) for c, v in labels.items()):
        raise ValueError(f"{path}:{number}: --labeler given expects labels of 1, 0 or -1 by CheXpert's names")
    return labels


def _chunk(lines):
    """Annotates numbered lines: (what to write, counts)."""
    path, graphs, labeler, stats = _TOOLS["path"], _TOOLS["graphs"], _TOOLS["labeler"], Counter()
    numbers = [number for number, _ in lines]
    records = [_parse(path, *line) for line in lines]
    for number, record in zip(numbers, records, strict=True):
        if not all(isinstance(record.get(key), str) for key in ("id", "report")):
            raise ValueError(f"{path}:{number}: expected the strings id and report")
    given = [graphs.get(r, n) if graphs else None for n, r in zip(numbers, records, strict=True)]
    stats["graphs: not in the file, made by rule"] += graphs is not None and given.count(None)

    def label(records, texts):
        if labeler == "given":
            return [_given(path, n, r) for n, r in zip(numbers, records, strict=True)]
        return labeler(texts) if labeler else list(map(label_report, texts))

    records = _annotate(records, _TOOLS["seed"], label, given, _TOOLS["generate"], stats)
    for record in records:
        _count(record, stats)
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return data.encode("utf-8", "replace"), stats


def _count(record, stats):
    stats["studies"] += 1
    stats["with hard negatives"] += bool(record["hard_negatives"])
    stats["without text"] += not record["report"]
    stats.update(f"positive: {c}" for c in positives(record["labels"]))


def _resume(part, settings, total):
    """Counts what is in the .part file of an interrupted run, whose settings must be these; its lines."""
    note = Path(f"{part}.json")
    if not note.exists() or not part.exists():
        part.write_bytes(b"")
        note.write_text(json.dumps(settings))
        return 0
    before = json.loads(note.read_text())
    changed = sorted(k for k in settings if before.get(k) != settings[k])
    if changed:
        raise ValueError(f"{part}: of an interrupted run with other {', '.join(changed)}; delete it to start afresh")
    done = size = 0
    with open(part, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            done, size = done + 1, size + len(line)
            _count(json.loads(line), total)
        file.truncate(size)
    return done


def _stream(chunks, workers, tools):
    """Results of _chunk in order, with a few chunks in flight, so that memory stays flat."""
    if workers < 2:
        _start(tools)
        yield from map(_chunk, chunks)
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(tools, True)) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_chunk, chunk))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("manifest", metavar="IN.jsonl", help="from data.py: id, report")
    parser.add_argument("--out", required=True, metavar="OUT.jsonl", help="the manifest to write")
    parser.add_argument("--labeler", choices=("rules", "chexbert", "given"), default="rules",
                        help="given: labels of the manifest, as MIMIC's and CheXpert's own tables")
    parser.add_argument("--chexbert", metavar="CKPT", help="chexbert.pth, for --labeler chexbert")
    parser.add_argument("--llm", metavar="MODEL", help="local instruct model that splits, cleans and omits, "
                        "checked by the rules")
    parser.add_argument("--graphs", default="rules", metavar="rules|FILE.json", help="RadGraph's output file")
    parser.add_argument("--seed", type=int, default=0, help="of choice, phrasing and position of the denials")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, for the rules")
    args = parser.parse_args(argv)
    if (args.labeler == "chexbert") != bool(args.chexbert):
        raise ValueError("--labeler chexbert and --chexbert CKPT go together")
    from tqdm import tqdm
    files = [args.manifest, *([args.graphs] if args.graphs != "rules" else []), *filter(None, [args.chexbert])]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "workers")} | {
        "files": [[os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files],
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    part, began, total = Path(f"{args.out}.part"), time.time(), Counter()
    done = _resume(part, settings, total)
    tools = {"path": args.manifest, "seed": args.seed, "generate": args.llm and local_model(args.llm),
             "graphs": None if args.graphs == "rules" else GraphFile(args.graphs),
             "labeler": CheXbert(args.chexbert) if args.chexbert else args.labeler == "given" and "given"}
    lines = itertools.islice(_lines(args.manifest), done, None)
    chunks = iter(lambda: list(itertools.islice(lines, 64)), [])
    workers = 1 if args.llm or args.chexbert else args.workers
    with open(part, "ab") as file, tqdm(unit="study", initial=done, disable=None) as bar:
        for data, counts in _stream(chunks, workers, tools):
            file.write(data)
            total += counts
            bar.update(counts["studies"])
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, args.out)
    Path(f"{part}.json").unlink()
    names = ["studies", "with hard negatives", *(f"positive: {c}" for c in CONDITIONS[:-1])]
    for name in [*names, *sorted(n for n in total if total[n] and n not in names)]:
        print(f"{name:52s}{total[name]:10,d}")
    print(f"{'studies per second':52s}{(total['studies'] - done) / (time.time() - began):10,.0f}")


if __name__ == "__main__":
    run_main(main)
