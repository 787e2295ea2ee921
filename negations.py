"""Labels, clean reports, hard negatives and graphs of chest X-ray reports (Sec. 3, 4.1, Fig. 2).

    python negations.py IN.jsonl --out OUT.jsonl     (--labeler, --llm, --graphs: see --help)

Fig. 2 as a local pipeline: a report r is split into sentences of one clinical entity without
comparison to priors; its positive conditions are found; for each of them the sentences about it are
removed (r^r, `omit`) and a denial is put at the beginning, middle or end (r^n, `negate`). Rules do
all of it. Models that run on this machine may replace the labeler (CheXbert) and the editor (an
instruct model, whose answers the rules check). Labels: 1 present, 0 denied, -1 uncertain.

How the rules label: each sentence is read alone. The phrases of FINDINGS are looked up; some deny
or hedge by themselves ("heart size is normal"), on the others TRIGGERS act, in a scope that ends
at words like "but" and at a comma before a new statement. An edit of a sentence is kept only if
its labels stay the same, so that splitting and clean-up cannot change what a report says.

SPDX-License-Identifier: MIT
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

CONDITIONS = (  # CheXbert's order
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices", "No Finding")
OTHER = "Other"  # abnormal, outside the 14: cancels No Finding
PRESENT, DENIED, UNCERTAIN = 1, 0, -1

# ---- tables of regular expressions, separated by ";": a line break is a blank (after "|" and "?"
# nothing), "*" any word ending; "-" before a phrase: it denies by itself, "?": it hedges by itself
HEART = (r"(?:heart|cardiac(?! (?:pace|device|lead|valve|monitor))|cardio-? ?mediastinal|"
         r"cardiopericardial)(?: (?:size|silhouettes?|shadow|contours?|outline)\b)?")
MEDIA = (r"(?:cardio-? ?)?mediastin(?:um|al(?! (?:lymph|node|mass|adeno|clip|fat)))"
         r"(?: (?:silhouettes?|shadow|contours?|structures|width|size)\b)?")
STOP = (r"(?!(?:but|with(?! \w+ limits)|without|however|there|although|while|no|clear|opaci\w+|"
        r"effusions?|which|abnormal|")
GAP = (rf"(?:[,:]? {STOP}enlarged|widened|prominent|tortuous|borderline)\b)[\w'/-]+)"
       r"{0,9}?[,:]? ")
NEAR = (rf"(?: {STOP}normal|and(?! (?:\w+ly )?enlarged)|pulmonary|lungs?|aort\w+|or|"
        r"unremarkable)\b)[\w'/-]+){0,6}? ")
FINE = (r"(?:normal|unremarkable|not remarkable|within limits|not (?:\w+ )?(?:enlarged|widened|"
        r"prominent)|(?:upper|top|high)[ -](?:limits? (?:of )?|range of |of )?(?:the )?normal|"
        r"upper limits?)")  # the upper limit of normal is normal, "borderline" is uncertain
BIG = r"(?:enlarged|enlargement|prominent|prominence|increased|large|wide|widened|widening)"
FINDINGS = {
    "Enlarged Cardiomediastinum": rf"""?{MEDIA}{GAP}borderline; -{MEDIA}{GAP}{FINE};
        -(?:normal|unremarkable)(?: [\w,/-]+){{0,5}}? {MEDIA}; {MEDIA}{NEAR}{BIG};
        {BIG}(?: of)?(?: \w+){{0,2}}? {MEDIA}""",
    "Cardiomegaly": rf"""?{HEART}{GAP}borderline; ?borderline(?: \w+){{0,3}}? (?:heart|cardi*);
        -{HEART}{GAP}{FINE}; -{FINE}(?: (?!mediast)[\w,/-]+){{0,4}}? {HEART}; cardiomegaly;
        (?:cardiac|ventricular) enlargement; {BIG}(?: of)?(?: \w+)?(?: \w+)? {HEART};
        {HEART}{NEAR}{BIG}""",
    "Lung Opacity": r"""-(?:lungs?|lung (?:fields?|bases|zones|\w+)|hemithora*)(?: (?:are|is|
        remains?|appears?|fields?|\w+ly|otherwise|both|well|expanded|and|but|normally|inflated|
        aerated)){0,5}:? clear(?! of); -clear(?: \w+)? lungs?; (?:\w+ )?opaci(?:ty|ties|fi*);
        infiltrat*; air[ -]?space (?:disease|process|\w+ disease); haz(?:e|y|iness);
        ground[ -]glass; (?:lung|pulmonary|airspace|increased|patchy|hazy|vague|streaky|
        ill-defined) densit*""",
    "Lung Lesion": r"""
        (?:micro)?nodul(?:es?|ar*)(?! (?:infiltr|contour|interst|pattern))(?: (?:opacit*|densit*|
        lesions?))?; mass(?:es)?(?! effect); tumou?rs?; neoplas*; malignan*; *carcinomas?;
        cancers?; metasta*; (?:lung|pulmonary|cavit*|focal) lesions?""",
    "Edema": r"(?<!tissue )(?:(?:pulmonary|interstitial|alveolar) ){0,2}o?edema",
    "Consolidation": "consolidat*",
    "Pneumonia": r"""(?:broncho)?pneumoni(?:as?|ae|tis); pna;
        (?<!granulomatous )(?<!prior )(?<!old )(?<!remote )infecti*(?: process| etiology)?""",
    "Atelectasis": r"atelecta*; (?:lobar|lobe|lung) collapse; collaps* (?:\w+ ){0,4}(?:lobe|lung)",
    "Pneumothorax": "(?:hydro)?pneumo-?thora*; ptx",
    "Pleural Effusion": r"""-pleural spaces?(?: \w+)? clear; (?<!pericardial )(?<!joint )effusions?;
        pleural (?:\w+ )?fluid; fluid in the (?:\w+ )?fissures?; hydropneumothora*; ha?emothora*""",
    "Pleural Other": r"""pleural(?:[- ]\w+)? (?:thicken*|scar*|plaques?|calcif*|capping|cap);
        thicken* of the (?:\w+ )?pleura; (?:bi)?apical cap*; pleuro-?parenchymal *; fibrothorax""",
    "Fracture": "fractur*",
    "Support Devices": r"""(?:\w+ )?tubes?; (?:central|venous|picc|ij|jugular|subclavian|arterial)
        (?:\w+ )?lines?; *catheters?; piccs?; pace-?makers?; port-?a-?cath*; mediport;
        (?:infusion|chest) port; prosthe*; hardware; screws?; stents?; (?:pacer|pacing|icd|aicd|
        ventricular|monitor*) (?:\w+ )?(?:leads?|wires?); a?icd; defibrillators?; stimulators?;
        (?:sternal|sternotomy|cerclage) (?:wires?|sutures?); (?:\w+ )?clips?; (?:\w+ )?devices?;
        generators?; balloon pump; etts?; ngt; ogt; iabp; lvad; rvad; cvc; cvl; swan-ganz; dob+hoff;
        *cannulas?; (?:prosthetic|mechanical|artificial|bioprosthetic) (?:\w+ )?
        valves?; valve (?:replacement|prosthesis); (?:pigtail|chest|pleural) drains?""",
    OTHER: r"""*granulom*; scar(?:s|red|ring)?; *emphysem*; copd; obstructive; fibro(?:sis|tic);
        hyper-?(?:inflat|expan|aerat|lucen)*; hypo-?(?:inflat|aerat|ventil)*; *scolio*; *kypho*;
        curvature; post-?traumatic; spond*; degenerat*; osteophyt*; arthr*; spur*; deminerali*;
        osteo(?:pen|por)*; hernia*; tort[uo]+r?o*; ectat*; ectasia; unfold*; uncoil*; calcif*;
        *sclero(?:sis|tic); aneurysm*; eventrat*; elevat*; volume loss; *adenopath*; congesti*;
        bronchiectas*; thicken*; engorge*; (?<!less )(?<!more )prominen*; enlarge*; deformit*;
        dislocat*; cysts?; cystic; bull(?:a|ae|ous); blebs?; cavit(?:y|ary|ation); sarcoid*;
        tubercul*; hyperosto*; fluid overload; cephali[sz]*; redistribut*;
        (?:low|small|decreased|diminished|reduced) (?:lung )?(?:volumes?|inspir*); foreign bod*;
        volumes? (?:(?:are|is|remains?) )?(?:low|decreased);
        (?:increased|coarse*|crowd*) (?:\w+ )?(?:\w+ )?markings; crowding; blunt*; flatten*;
        pectus; lucen*; heart failure; chf; hypertension; pneumo(?:periton|mediastin)*;
        free (?:\w+ )?air; shift*; deviat*; fullness; sternotomy; *ectomy; cabg;
        (?:post-?)?(?:surg|operat)* change*; bypass; effusions?; densit(?:y|ies); lesions?;
        injur*; distort*; retract*; chronic \w+ (?:change|disease)*; abnormalit*;
        (?:\w+ )?(?:process|disease);
        (?:acute|abnormal|significant|active|*pulmonary|bony|osseous) findings?""",
}
# no: denies what follows; denied: what precedes; maybe: hedges what follows; hedge: either;
# ignore: nothing is said of this image; skip: a look-alike; end: of a scope. The first match wins.
TRIGGERS = (
    ("hedge", r"""(?:cannot|can not|can't|could not|not|difficult to|hard to)(?: \w+)? (?:be )?
        (?:entirely |completely |definitely )?(?:excluded?|rule out|ruled out);
        (?:is |are )?not (?:entirely |completely )?excluded"""),
    ("still", r"""(?:no|not|without|little)(?: \w+){0,2}? (?:changed?|changes (?:in|from|since)|
        increased?|decreased?|difference|worsen*|improve*|progress*)\b(?: in| of)?"""),
    ("skip", r"""no (?:comparison|priors?|previous); not (?:only|include*|
        (?:well |fully |completely )?(?:evaluated|assessed));
        (?:compatible|consistent|associated|in keeping|correlat*|along|together) with;
        (?:not|better)(?: \w+)? (?:seen|visuali[sz]ed|present|noted|apparent|identified|
        appreciated) (?:\w+ )?on (?:the )?(?:\w+ )?(?:prior|previous|lateral|frontal);
        (?:near|almost|most|large|partial|incomplete)(?:ly)?[- ](?:\w+ )?(?:resol|clear)*(?: of)?
        """),
    ("denied", r"""(?:is|are|was|were|has|have|had|can be)(?: now| since| been| (?!near|
        most|large|part|incompl)\w+ly){0,3} (?:ruled out|excluded|absent|resolved|cleared|gone|
        discontinued); ruled out; removed; removal(?! of); unlikely;
        : (?:none|no|absent|negative)(?=\W{0,9}$);
        (?:not|no longer) (?:\w+ )?(?:seen|visuali[sz]ed|identified|present|evident|noted|
        demonstrated|appreciated|detected|found)(?! (?:is|are))"""),
    ("ignore", r"""recommend*; advise*; correlat*; evaluat* (?:for|of|to); assess* (?:for|of);
        sensitive; obscur*; history of; h/o; please note; to identify; look for; f/u;
        follow-?up; (?:ensure|document|confirm|until)(?: \w+){0,2} (?:resol|clear)*(?: of)?"""),
    ("no", r"""(?:negative|free|clear) (?:for|of|from); no longer; rather than; instead of; no;
        (?:interval |complete )?(?:removal|resolution|clearing|absence) of; resolved; not; without;
        w/o; never; neither; nor; denies; absent; non"""),
    ("hedge", r"""(?:is |are )?(?:also |again )?(?:suspected|questioned|possible|considered|
        favou?red)(?=\W{0,9}$); \?; (?:(?:is|are)(?: less| more| most)?|(?:should|must|
        would)(?: also)? be) (?:possible|suspected|questioned|considered|likely|probable|presumed|
        in the differential)"""),
    ("maybe", r"""(?:may|might|could)(?: also| well)?(?: be)?(?: (?:secondary|due|related) to)?;
        possibl[ey]; probabl[ey]; likely; suspect*; suspicious; concern*; question*; consider*;
        suggest*; perhaps; potential*; worrisome; presum*; doubt*; rule out; exclude; versus; vs;
        differential; equivocal; apparent; borderline; if"""),
    ("end", r"""but; however; although; though; except; aside from; other than; otherwise; which;
        apart from; secondary to; status post; s/p;
        (?:after|following)(?=(?: \w+){0,3} (?:place|remov|insert|intubat)*); because; while;
        whereas; yet; [\x3b:]; ,? with"""),
    ("end", r"""(?:,|and)(?= (?:the|there|stable|heart(?! enlarg)|lungs?(?! (?:lesion|nodul|mass|
        opac|consol|infiltr))|cardi(?!omegaly|ac enlarg)*|cardiomegaly (?:is|was|remains|persists|
        has)|mediast*|is|are|possibl[ey]|probabl[ey]|likely|may|with|consistent|compatible|
        unchanged|status|again|which|however|visuali*|limited)\b)"""),
    ("end", r"""(?:,|and)(?= (?:a|an|mild*|moderate*|minimal*|marked*|severe*|small|large|low|old|
        tortuous|degenerative|normal|prominent|calcified|chronic|healed|bilateral|left|right|
        multiple|hyper*) (?![^.\x3b]{0,200}\b(?:or|nor)\b))"""),  # not in "no X, large Y or Z"
)
PRIOR = "(?:prior|previous|earlier(?: in the day)?|preceding|last|comparison|old|outside|recent)"
STUDY = ("(?:exam*|stud(?:y|ies)|(?:radio|tomo)graphs?|films?|x-?rays?|ct|xxxx|_{2,}|chest|scans?|"
         "images?|yesterday|today|morning)")
GRADED = "(?:slight|mild|minimal|marked|significant|further|some)(?:ly)?"
AGO = r"(?:performed )?(?:\w+|\d+) (?:minutes?|hours?|days?|weeks?|months?|years?) (?:ago|earlier)"
SINCE = (rf"(?: (?:the|a|an|his|her|most|that|this|of|immediate|{PRIOR})){{0,5}} (?:{PRIOR}|{AGO}|"
         rf"(?:\w+ )?{STUDY}|(?:19|20)\d\d)(?: (?:{STUDY}|{AGO}|from|dated|of|on|at|performed|"
         r"\d[\d/:]{0,9}|[ap]\.?m\b\.?)){0,6}")
STEADY = "(?:unchanged|changed|stable)(?: in (?:appearance|size|position|configuration))?"
MORE = "(?:increase|decrease|worsening|improvement|progression|reduction)s?"
TIME = rf"""(?:when |as )?(?:compar(?:ed|ing|ison)|in comparison|relative|{STEADY}|differ*|
    similar(?: in appearance)?|changes?)(?: \w+ly)? (?:to|with|from|since){SINCE};
    (?:(?:not |as |better )?(?:\w+ly |well )?(?:seen|noted|\w+er|worse|more \w+|less \w+) )?
    (?:since|from|on|as of|than(?: on)?)(?= (?:\w+ ){{0,3}}?(?:{PRIOR}|yesterday|_{{2,}}|
    {AGO})){SINCE}; since (?:19|20)\d\d; (?:as|similar to) before; (?:in|over|during) the interval;
    in the interim; redemonstrat(?:ed|ion of); (?:similar|stable|unchanged) (?:in )?appearance
    of(?: the)?(?: chest with)?;
    (?:no|without|little)(?: \w+)?(?: \w+)? (?:changes?|progression|improvement|worsening|increase|
    decrease)(?: (?:in|of)(?: the)?(?: (?:size|appearance|extent)(?: of)?(?: the)?)?|
    (?=$|\W?(?:since|from|compared|[,.]))); (?:{GRADED} )?interval (?:development|appearance|change|
    placement|enlargement|{MORE})s?(?: of| in)?(?: the)?; persists?;
    (?:not |no )?(?:significantly |essentially |relatively |grossly |overall )?{STEADY};
    new(?! york); (?:{GRADED} )?{MORE} (?:in|of)(?: the)?(?: size of)?(?: the)?;
    (?:\w+ly )?(?:less|more) (?:prominent|conspicuous|apparent|evident|pronounced|
    extensive)(?! than| on| in| at); (?:\w+ly )?(?:larger|smaller|worse)(?! than| on| in| at);
    (?:\w+ly |further )?(?:worsen(?:ed|ing)|interval|improv(?:ed|ing)|resolving|enlarging|
    (?:in|de)creasing|persistent(?:ly)?|continued|recurrent|residual); (?:has|have|is|are) (?:\w+ly
    )?(?:increased|decreased|progressed|developed|improved|worsened)(?: in (?:size|number|extent))?;
    (?:\w+ly )?(?:increased|decreased)(?: in size)?(?=$|\W?(?:since|from|compared|[,.]));
    in (?:unchanged|stable|similar) (?:position|location|appearance);
    (?:once again|again|previously|newly|now)(?: (?:seen|noted|demonstrated|identified|described|
    is|are)){{0,2}}"""
NOUNS = {  # how a condition is denied: nouns for DENIALS; a capital starts a whole sentence
    "Enlarged Cardiomediastinum": ("mediastinal widening", "mediastinal enlargement",
                                   "The mediastinum is normal in width."),
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement", "The heart is normal in size.",
                     "Heart size is within normal limits."),
    "Lung Opacity": ("pulmonary opacity", "airspace opacity", "lung infiltrate"),
    "Lung Lesion": ("pulmonary nodule", "lung mass", "pulmonary nodule or mass"),
    "Edema": ("pulmonary edema", "edema"),
    "Consolidation": ("consolidation", "focal consolidation"),
    "Pneumonia": ("pneumonia",), "Atelectasis": ("atelectasis",),
    "Pneumothorax": ("pneumothorax",), "Pleural Effusion": ("pleural effusion", "pleural fluid"),
    "Pleural Other": ("pleural thickening",), "Fracture": ("fracture", "displaced fracture"),
    "Support Devices": ("support device", "catheter or tube"),
}
# ASSUMPTION: the predefined negative statements (Sec. 3) are unpublished; these are ours.
DENIALS = ("No {}.", "There is no {}.", "No evidence of {}.", "No {} is seen.",
             "Negative for {}.")
# ASSUMPTION: if omission leaves nothing, r^r is this sentence, which names no finding.
NOTHING_LEFT = "Frontal chest radiograph."
SIDES = frozenset("left right bilateral bilaterally both left-sided right-sided".split())
PLACES = SIDES | frozenset("""bibasilar biapical basilar basal apical lower upper middle mid
    midlung lingular retrocardiac perihilar hilar peripheral central medial lateral anterior
    posterior thoracic lumbar cervical subclavian jugular cardiac mediastinal pleural pulmonary
    lung lungs lobe lobes base bases apex apices hilum hila heart silhouette silhouettes
    mediastinum aorta aortic trachea diaphragm hemidiaphragm hemidiaphragms rib ribs spine clavicle
    pleura lingula costophrenic cardiophrenic rul rml rll lul lll svc atrium ventricle stomach
    humerus shoulder sternum vertebra vertebrae vertebral cardiomediastinal contour contours
    vasculature vascularity angle angles sulcus zone zones bones osseous structures hemithorax
    thorax chest abdomen fissure vessels artery arteries vein interstitium bronchi carina
    cardiopulmonary bony skeletal soft tissues airways field fields""".split())
GRADES = frozenset("""mild mildly moderate moderately severe severely minimal minimally marked
    markedly trace tiny small large massive subtle slight slightly patchy focal diffuse multifocal
    scattered streaky linear hazy dense ill-defined acute chronic subsegmental segmental platelike
    discoid interstitial alveolar airspace calcified displaced nondisplaced healed old compression
    multiple few several early extensive faint vague loculated layering nodular coarse reticular
    bullous bandlike confluent active significant definite mixed round rounded cm mm""".split())
STATES = frozenset("normal clear unremarkable intact midline expanded inflated aerated".split())
EMPTY = frozenset("""the a an is are was of in there chest exam examination study studies
    appearance finding findings xxxx this these it and or with to no not has have been from by
    comparison compared prior previous available none interval change changes changed otherwise
    overall radiograph radiographs film films x-ray as on at for made significant significantly
    view views also appear appears size shape configuration volumes dated comparisons images
    currently""".split())


# ---- what a sentence says
def _phrases(table):
    flat = (" ".join(p.split()) for p in re.sub(r"(?<=[|?])\n\s+", "", table).split(";"))
    return [p.replace("*", r"\w*") for p in flat if p]


def _compile(name, table):
    """(stems, pattern): without a word that has one of the stems there is no match."""
    phrases, groups = _phrases(table), []
    for kind, sign in (("hedge", "?"), ("deny", "-"), ("affirm", "")):
        own = [p[len(sign):] for p in phrases if (p[0] if p[0] in "?-" else "") == sign]
        groups += [f"(?P<{kind}>(?:{'|'.join(own)})(?!\\w))"] if own else []
    literal = re.sub(r"\\.|\[[^]]*\]|\w\?|\(\?:[^()]*\)\?", " ", " ".join(phrases))
    fixed = {"Cardiomegaly": ["heart", "card"], "Enlarged Cardiomediastinum": ["mediast"]}
    stems = fixed.get(name) or sorted(set(re.findall(r"[a-z]{3,}", literal)))
    return re.compile("|".join(stems)), re.compile(rf"\b(?:{'|'.join(groups)})")


_FINDINGS = {name: _compile(name, table) for name, table in FINDINGS.items()}
_TRIGGERS = re.compile(r"\b(?:" + "|".join(
    f"(?P<{kind}_{i}>{'|'.join(_phrases(table))})" for i, (kind, table) in enumerate(TRIGGERS))
    + r")(?!\w)")
_OR = re.compile(r"\b(?:versus|vs|and/or|or)\b")


@lru_cache(1 << 15)
def _candidates(word):
    return frozenset(name for name, (stems, _) in _FINDINGS.items() if stems.search(word))


def _scope(triggers, start, end):
    """1, 0, -1 or None (nothing said) by the triggers before a finding, then those after it."""
    before = [k for k, first, last in triggers if first < end and (last <= start or k != "end")]
    value = PRESENT
    for kind in reversed(before):
        if kind == "end":
            break
        if kind in ("ignore", "no"):
            return DENIED if kind == "no" else None
        value = UNCERTAIN if kind in ("maybe", "hedge") else value
    for kind in (k for k, first, _ in triggers if first >= end):
        if kind in ("end", "denied"):
            return DENIED if kind == "denied" else value
        value = UNCERTAIN if kind == "hedge" else value
    return value


def mentions(sentence):
    """All findings of a sentence by position: (condition or "Other", 1 | 0 | -1, start, end)."""
    letters = sentence if sentence.isascii() else (c.lower()[0] for c in sentence)
    return _mentions("".join(letters).lower().rstrip(" ."))


@lru_cache(1 << 15)
def _mentions(lower):
    found, triggers = [], None
    candidates = frozenset().union(*map(_candidates, lower.split()))
    for name in (name for name in _FINDINGS if name in candidates):
        for m in _FINDINGS[name][1].finditer(lower):
            if name == OTHER and any(s < m.end() and m.start() < e for *_, s, e in found):
                continue
            if triggers is None:
                hits = _TRIGGERS.finditer(lower)
                triggers = [(t.lastgroup.split("_")[0], *t.span()) for t in hits]
            value = {"hedge": UNCERTAIN, "deny": DENIED}.get(m.lastgroup, PRESENT)
            value = _scope(triggers, *m.span()) if value == PRESENT else value
            found += [(name, value, *m.span())] if value is not None else []
    found.sort(key=lambda m: m[2:])
    said = [m for m in found if m[1] != DENIED]
    still = any(kind == "still" for kind, *_ in triggers or ())  # "no change in A or B" has both
    pairs = () if still else itertools.pairwise(said)
    unsure = {m for a, b in pairs for m in (a, b)  # "A or B", "A versus B"
              if a[0] != b[0] and "," not in lower[a[3]:b[2]] and _OR.search(lower, a[3], b[2])}
    return tuple((m[0], UNCERTAIN, *m[2:]) if m in unsure else m for m in found)


def _said(sentences):
    """Labels of sentences, "Other" among them: present beats uncertain beats denied."""
    labels = {}
    for name, value, *_ in (m for s in sentences for m in mentions(s)):
        if value == PRESENT or not labels.get(name):
            labels[name] = value
    return labels


def label_report(text):
    """CheXpert labels of a report by rules: {condition: 1 | 0 | -1}, absent = not mentioned.

    No Finding is 1 if there is a text in which no abnormality, of the 14 or not, is present or
    uncertain (support devices aside), else absent.
    """
    # DIFFERS from Sec. 4.2: labels come from rules, unless --labeler chexbert or given.
    sentences = _sentences(text)
    labels = _said(sentences)
    return _with_no_finding(labels) if sentences else {}


def _with_no_finding(labels):
    """Labels in CheXbert's order; No Finding is 1 if nothing but devices and denials is there."""
    normal = not any(v for c, v in labels.items() if c != "Support Devices")
    return {c: labels[c] for c in CONDITIONS if c in labels} | ({"No Finding": 1} if normal else {})


def positives(labels):
    """Names among the 13 conditions besides No Finding whose value is 1, in CheXbert's order."""
    return [c for c in CONDITIONS[:-1] if labels.get(c) == 1]


# ---- sentences of one entity, without time (Sec. 3; Fig. 2, step i)
_WORD = re.compile(r"[\w'/.-]*\w")
_BREAK = re.compile(r"(?<=[.!?])(?<!\bDr\.)(?<!\bvs\.)\s+|(?<=[a-z]{2}[.])(?=[A-Z])|(?<=;)\s+|"
                    r"\s(?=\d{1,2}[.)] [A-Z]|(?:FINDINGS|IMPRESSION)\s?:)")
_NUMBER = re.compile(r"^\W*(?:\d{1,2}[.)](?!\d)\s*)?"
                     r"(?:(?:findings|impression|(?:[ap]{2} )?chest)\s*:\s*)?", re.I)
_CUTS = (  # a conjunction, else a comma
    re.compile(r"(?<!compatible)(?<!consistent)(?<!keeping)(?<!associated),?\s+(?:(?=without\b)"
               r"|(?:and/or|and|or|nor|versus|vs\.?|with|but|however|although|while|as well as)\b"
               r",?\s+)"),
    re.compile(r"[,;]\s+"))
_PLACE_LIST = re.compile(  # "heart size and mediastinal contours are normal"
    r"^(?P<lead>(?:the |both |normal |unremarkable )*)"
    r"(?P<items>[\w\s,/-]+?,? and (?:the )?[\w\s-]+?)"
    r"(?P<tail>\s(?:are|is|appears?|remains?|within|grossly|normal|unremarkable|clear)\b[^,;]*)?$",
    re.I)
_ADJECTIVE = re.compile(r"(?:cardiac|[a-z]*mediastinal|hilar|pulmonary|pleural|osseous|bony)$")
_LEAD = re.compile(r"^(?:and|but|although|though|while|however|aside from|apart from|except for|"
                   r"other than|(?:compatible|consistent) with)\b,?\s*", re.I)
_BARE = re.compile(r"\W*\w+(?:ed|ous|ic|ent|ive)\W*(?:$|(?:and|or|but)\b)", re.I)  # no noun
_ITS_NOUN = re.compile(r"(?<=ed|us|ic|nt|ve)(?: and \w+)?(?: (?!with|and|or|in|of|is|are)[\w-]+)"
                       r"{1,2}")
_GONE = re.compile(r"\b(?:removal|resolution|clearing) of|\bha(?:s|ve|d) (?:been |since )*(?:"
                   r"removed|resolved|cleared)|\bno longer\b", re.I)
_TIME = (
    (re.compile(r"\bremains\b", re.I), "is"), (re.compile(r"\bremain\b", re.I), "are"),
    (re.compile(rf"\b(?:{'|'.join(_phrases(TIME))})(?!\w)", re.I), " "),
    (re.compile(r"\b(t)here (?:has|have) been\b", re.I), r"\1here is"),
    (re.compile(r"\b(no|the|an?|there (?:is|are)|(?:is|are)(?= and (?:\w+ly|\w+ed|within|normal|"
                r"most)\b))(?: ?,| and| or| but)(?= )", re.I), r"\1"),
    (re.compile(r"\b(?:is|are)(?: and\b|(?= but| bilaterally))", re.I), " "),
    (re.compile(r"\b([Aa])(?= (?!one)[aeio])"), r"\1n"),
    (re.compile(r"\b([Aa])n(?= [b-df-gj-np-tv-z])"), r"\1"))
_TIME_WORD = re.compile(
    "compar|relative|similar|chang|stabl|differ|since|prior|previous|last|earlier|preced|inter|new|"
    "longer|progress|worsen|improv|increas|decreas|enlarging|persist|recur|residual|resol|clear|"
    "remov|than|develop|demonst|again|now|remain|before|less|more|larger|smaller|continued", re.I)
_HEAD = re.compile(r"^(?:(?:and|but|or|which|is|are|of|in|however|otherwise)\b\W*|\W+)+(?=\S)",
                   re.I)
_REST = re.compile(r"(?:\b(?:is|are|has|have|been|appears?|there|to|be|and|but|with|of|in|or|also|"
                   r"which)\b\W*)+$|\s+(?:(?:is|are|has|have) ?)?(?=[,.;])|,\s*(?=[,.;]|$)", re.I)
_PLACE_TAIL = re.compile(r" (?:in|of|at|within|involving|overlying)(?: the)?(?: [\w-]+){0,3}? (?:"
                         + "|".join(sorted(PLACES)) + r")\b", re.I)


@lru_cache(1 << 13)
def _sentences(text):
    parts = (_NUMBER.sub("", part).strip() for part in _BREAK.split(" ".join(text.split())))
    return tuple(part for part in parts if _WORD.search(part))


def _finish(piece):
    piece = piece.strip(" ,;:-.")
    return piece[:1].upper() + piece[1:] + "." if piece else ""


def _phrase(value, text):
    lead = {PRESENT: "", DENIED: "No ", UNCERTAIN: "Possible "}[value]
    plain = lead and text[1:2].islower()  # not "PICC"
    return _finish(lead + (text[:1].lower() + text[1:] if plain else text))


@lru_cache(1 << 15)
def _split(sentence):
    """One entity a sentence where a list or a conjunction can be cut without changing any label."""
    pieces = [sentence]
    for cut in (_cut_places, _cut_findings) * 2:
        cuts = [(piece, cut(piece)) for piece in pieces]
        pieces = [p for piece, parts in cuts
                  for p in (parts if parts and _said(parts) == _said([piece]) else [piece])]
    return tuple(map(_finish, pieces))


def _cut_places(sentence):
    match = _PLACE_LIST.match(sentence.strip(" ."))
    if not match or not (match["tail"] or re.search("normal|unremark", match["lead"], re.I)):
        return ()
    items = re.split(r",\s*(?:and\s+)?|\s+and\s+", match["items"].strip())
    verb = re.compile(r"\b(?:is|are|there|no|without|with|of)\b")
    if any(len(i.split()) > 4 or verb.search(i) for i in items):
        return ()
    head, tail = items[-1].split()[-1], match["tail"] or ""
    items = [i.removeprefix("the ") + (f" {head}" if _ADJECTIVE.search(i.lower()) else "")
             for i in items if i]
    one = re.sub(r"^ (are|appear)\b", lambda m: {"are": " is", "appear": " appears"}[m[1]], tail)
    return [_finish(match["lead"] + i + (tail if re.search("[^su]s$", i) else one)) for i in items]


def _cut_findings(sentence):
    found, pieces, begin = mentions(sentence), [], 0
    for a, b in itertools.pairwise(found):
        cuts = (cut.search(sentence, a[3], b[2] + 1) for cut in _CUTS)
        cut = next((c.span() for c in cuts if c and begin < c.start() and c.end() <= b[2]), None)
        if cut and not (_BARE.fullmatch(sentence, begin, cut[0]) or _BARE.match(sentence, cut[1])):
            pieces.append((begin, cut[0]))
            begin = cut[1]
    out = []
    for start, end in [*pieces, (begin, len(sentence))]:
        piece = _LEAD.sub("", sentence[start:end].strip(" ,;."))
        piece = re.sub(r"(?i)^without\b|\bneither\b", "no", piece)
        values = {m[1] for m in found if start <= m[2] < end}
        moved = len(values) == 1 and values != {m[1] for m in mentions(piece)}  # its trigger
        out.append(_phrase(min(values), piece) if moved else _finish(piece))
    return out


@lru_cache(1 << 15)
def _timeless(sentence, whole=True):
    """The sentence without comparison to priors; "" if nothing else was said."""
    text, found = sentence, mentions(sentence)
    if _TIME_WORD.search(text):
        if _GONE.search(text) and any(m[1] == DENIED for m in found):
            text = " ".join(_phrase(m[1], _noun_phrase(text, m)) for m in found)
        for pattern, to in _TIME:
            text = " ".join(pattern.sub(to, text).split())
    if text != sentence:
        trimmed = (_REST.sub("", part.strip(" ,;.")) for part in _sentences(text))
        text = " ".join(_finish(_HEAD.sub("", part)) for part in trimmed)
    rest = {w.lower() for w in _WORD.findall(text)} - EMPTY
    rest = {w for w in rest if not w[0].isdigit() and "xxxx" not in w and w.strip("_")}
    if not found and not (rest - PLACES if text != sentence else rest):
        return ""
    if _said(_sentences(text)) == _said([sentence]):
        return text if text.endswith(".") else text + "."
    pieces = _split(sentence)
    return " ".join(filter(None, (_timeless(p, False) for p in pieces))) if whole else pieces[0]


def _noun_phrase(sentence, mention):
    """The finding with the side, grade and place words around it: "small left effusion"."""
    start, end = mention[2:]
    for word in reversed(list(_WORD.finditer(sentence, 0, start))):
        if word[0].lower() not in PLACES | GRADES or sentence[word.end():start].strip():
            break
        start = word.start()
    tails = (_ITS_NOUN.match(sentence, end) if mention[0] == OTHER else None,
             _PLACE_TAIL.match(sentence, end))
    return sentence[start:max(tail.end() if tail else end for tail in tails)]


def split_sentences(text):
    """Sentences of one clinical entity each, where rules can cut lists and the like (Sec. 3)."""
    # DIFFERS from Sec. 3: rules split and omit, where the paper asks Gemini; --llm asks your model.
    return [piece for sentence in _sentences(text) for piece in _split(sentence)]


def remove_temporal(text):
    """The report without comparison to prior examinations; findings and labels stay (Sec. 3)."""
    return " ".join(filter(None, map(_timeless, _sentences(text))))


# ---- omission and negation (Sec. 3, Sec. 4.1; Fig. 2, step ii)
@lru_cache(1 << 15)
def _omit(sentence, condition):
    """What remains without the condition: other findings of the sentence become noun phrases."""
    found = mentions(sentence)
    if all(m[0] != condition for m in found):
        return (sentence,)
    kept = []
    for name, value in _said([sentence]).items():
        if name == condition or (name == OTHER and value == DENIED):
            continue
        phrases = [p for m in found if m[:2] == (name, value)
                   for p in (_noun_phrase(sentence, m), sentence[m[2]:m[3]])]
        phrases += NOUNS.get(name, ())[:1]
        says = {phrase: _said([phrase]) for phrase in (_phrase(value, p) for p in phrases)}
        kept += [p for p, s in says.items() if s.get(name) == value and condition not in s
                 and not _BARE.fullmatch(p)][:1]
    return tuple(kept)


def _omitted(sentences, condition):
    return [t for s in sentences for t in _omit(s, condition)]


def _insert(rest, condition, rng):
    """A denial put into the remaining sentences: (r^n, position), a position that they have."""
    def draw(items):
        return items[int(rng.random() * len(items))]
    noun = draw(NOUNS[condition])
    denial = noun if noun[0].isupper() else draw(DENIALS).format(noun)
    position = draw(("beginning", "end", "middle")[:1 + bool(rest) + bool(rest[1:])])
    at = draw({"beginning": [0], "end": [len(rest)]}.get(position, range(1, len(rest))))
    return " ".join([*rest[:at], denial, *rest[at:]]), position


def omit(text, condition):
    """r^r: the report without the sentences about the condition, affirmed or denied (Sec. 3)."""
    return " ".join(_omitted(split_sentences(text), condition)) or NOTHING_LEFT


def negate(text, condition, rng):
    """(r^r, r^n) of a cleaned report: the condition omitted, and denied somewhere (Sec. 3, Fig. 2).

    condition: one of the 13 besides No Finding. rng: random.Random or numpy's Generator.
    """
    if condition not in NOUNS:
        raise ValueError(f"cannot negate {condition!r}: expected one of {', '.join(NOUNS)}")
    rest = _omitted(split_sentences(text), condition)
    return " ".join(rest) or NOTHING_LEFT, _insert(rest, condition, rng)[0]


# ASSUMPTION: r^n's labels and graph are r's, edited for the one condition, whoever made them.
def _negated_labels(labels, condition):
    """r's labels with the condition at 0, and No Finding anew."""
    others = {c: v for c, v in labels.items() if c != "No Finding"}
    return _with_no_finding(others | {condition: DENIED})


# ---- graphs in RadGraph's schema (Sec. 4.3)
_TOKEN = re.compile(r"\d+\.\d+|[\w'/-]+|[^\w\s]")
_SIZE = re.compile(r"[\d.]+(?: x [\d.]+)* ?(?:cm|mm)\b")
_LEADS_TO = re.compile(r"suggest|represent|consistent|compatible|reflect|concern|due to", re.I)
_LABEL = {PRESENT: "OBS-DP", DENIED: "OBS-DA", UNCERTAIN: "OBS-U"}
_FUNCTION = frozenset("the a an is are was were of in at to with and or not within no size top "
                      "upper high limit limits range".split())


def _nodes(sentence):
    """(tokens, nodes); a node is [kind, value, index of its finding, first token, last token]."""
    found, tokens, nodes = mentions(sentence), [], []
    for i, m in enumerate(_TOKEN.finditer(sentence)):
        word, kind = m[0].lower(), None
        at = next((k for k, f in enumerate(found) if f[2] <= m.start() < f[3]), None)
        if word in PLACES or word in GRADES or _SIZE.match(sentence, m.start()):
            kind = "place" if word in PLACES else "grade"
        elif word in STATES or (at is not None and word[0].isalpha() and word not in _FUNCTION):
            kind = "finding"
        node = [kind, PRESENT if at is None or word in STATES else found[at][1], at, i, i]
        same = kind == "finding" and nodes and nodes[-1][:3] == node[:3] or word in ("cm", "mm")
        if same and nodes and nodes[-1][4] == i - 1:
            nodes[-1][4] = i
        elif kind:
            nodes.append(node)
        tokens.append(m[0])
    return tokens, nodes


@lru_cache(1 << 13)
def _sentence_graph(sentence):
    """(tokens, [(first token, last token, label, [(relation, index of the target)])])."""
    tokens, nodes = _nodes(sentence)
    places, grades, findings = ([i for i, n in enumerate(nodes) if n[0] == kind]
                                for kind in ("place", "grade", "finding"))
    heads = {}  # node -> nodes it may modify or be located at
    for i in places:  # "left lower lobe": each word modifies the next; "left effusion": the finding
        after = nodes[i + 1][0] if nodes[i + 1:] and nodes[i + 1][3] == nodes[i][4] + 1 else None
        if after == "place":
            heads[i] = [i + 1]
        elif after and tokens[nodes[i][3]].lower() in SIDES:
            heads[i] = findings
    heads |= {i: [p for p in places if p not in heads] for i in findings}
    heads |= {i: findings or places for i in grades}
    arrow, out = _LEADS_TO.search(sentence), []
    middle = len(_TOKEN.findall(sentence[:arrow.start()])) if arrow else -1
    later = [f for f in findings if nodes[f][3] > middle]
    for i, (kind, value, _, first, last) in enumerate(nodes):
        relations = []
        if heads.get(i):  # what modifies stands before its head more often than after it
            near = min(heads[i], key=lambda h: (abs(h - i) + 3 * (h < i and kind != "finding"), h))
            relations = [("located_at" if kind == "finding" else "modify", near)]
            value = nodes[near][1] if kind == "grade" else value
        if kind == "finding" and last < middle and later:
            relations.append(("suggestive_of", later[0]))
        out.append((first, last, "ANAT-DP" if kind == "place" else _LABEL[value], relations))
    return tokens, out


def rule_graph(sentences):
    """A RadGraph record by rule: anatomy; present, absent, uncertain observations; relations."""
    # DIFFERS from Sec. 4.3: graphs come from rules, unless --graphs or the record brings them.
    text, entities = [], {}
    for tokens, nodes in map(_sentence_graph, sentences):
        at, base = len(text), len(entities) + 1
        for i, (first, last, label, relations) in enumerate(nodes):
            entities[str(base + i)] = {
                "tokens": " ".join(tokens[first:last + 1]), "label": label, "start_ix": at + first,
                "end_ix": at + last, "relations": [[r, str(base + to)] for r, to in relations]}
        text += tokens
    return {"text": " ".join(text), "entities": entities, "data_source": "rules"}


def _tokens_about(text, condition):
    hit, at = set(), 0  # at: where the sentence starts
    for sentence in re.split(r"(?<= [.;]) ", text):
        for name, _, start, end in mentions(sentence):
            if name == condition:
                hit.update(text.count(" ", 0, k) for k in range(at + start, at + end))
        at += len(sentence) + 1
    return hit


def negated_graph(graph, condition):
    """r^n's record: r's without the condition's entities, plus one absent observation of it."""
    entities, hit = graph["entities"], _tokens_about(graph["text"], condition)
    anatomy = {k for k, e in entities.items() if e["label"].upper().startswith("ANAT")}
    gone = {k for k in entities.keys() - anatomy
            if not hit.isdisjoint(range(entities[k]["start_ix"], entities[k]["end_ix"] + 1))}
    links = {k: {t for _, t in e["relations"]} for k, e in entities.items()}
    for k, e in entities.items():
        for _, t in e["relations"]:
            links.setdefault(t, set()).add(k)
    loose = anatomy | {k for k, e in entities.items() if "modify" in dict(e["relations"])}
    for k in set().union(*(links[g] for g in gone)) - gone:  # what stood there for those alone
        part, fresh = set(), {k}
        while fresh:
            part |= fresh
            fresh = set().union(*(links[j] for j in fresh)) - part - gone
        gone |= part if part <= loose else set()
    kept = {k: e | {"relations": [r for r in e["relations"] if r[1] not in gone]}
            for k, e in entities.items() if k not in gone}
    noun, style = NOUNS[condition][0], any("::" in e["label"] for e in entities.values())
    first = graph["text"].count(" ") + 2 if graph["text"] else 1
    kept[str(max(map(int, entities), default=0) + 1)] = {
        "tokens": noun, "label": "Observation::definitely absent" if style else "OBS-DA",
        "start_ix": first, "end_ix": first + noun.count(" "), "relations": []}
    return graph | {"text": f"{graph['text']} no {noun} .".strip(), "entities": kept}


def _whole_graph(graph):
    """A RadGraph record, also from {"0": record}; None if it lacks what an edit needs."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        graph = graph.get("0", graph)
        for name, e in graph["entities"].items():
            kinds = (e["tokens"], str), (e["label"], str), (e["start_ix"], int), (e["end_ix"], int)
            good = name.isdigit() and all(isinstance(value, kind) for value, kind in kinds)
            if not good or any(to not in graph["entities"] for _, to in e["relations"]):
                return None
        return graph if isinstance(graph["text"], str) else None
    return None


# ASSUMPTION: a RadGraph file describes the uncleaned report; its graph serves the cleaned one.
class GraphFile:
    """RadGraph's JSON file, read by record: PhysioNet's keys by study, the package's by line."""
    _RECORD = re.compile(rb'"([^"\\]+)"\s*:\s*(?=\{\s*"(?:text|entities|data_source|data_split)")')
    _STUDY = re.compile(r"(?<!\w)s?(\d{8})(?!\w)")

    def __init__(self, path):
        self.path, self.at = path, {}  # study or line -> (start, end) in the file
        if not os.path.getsize(path):
            raise ValueError(f"{path}: expected RadGraph's JSON object of records, got no byte")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = [(m[1].decode("latin-1"), m.end()) for m in self._RECORD.finditer(data)]
        for (key, start), (_, end) in itertools.pairwise([*found, ("", os.path.getsize(path))]):
            study = self._STUDY.search(key)
            self.at[study[1] if study else key] = start, end
        if not found:
            raise ValueError(f"{path}: expected RadGraph's JSON object of records")

    def get(self, record, number):
        """The graph of a manifest's record, on this line of it; None if the file has none."""
        found = self._STUDY.findall(f"{record['id']} {record.get('image')}")
        keys = [str(record["study_id"])] if "study_id" in record else [*found, str(number - 1)]
        start, end = next((self.at[key] for key in keys if key in self.at), (None, None))
        if start is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start).decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            if graph := _whole_graph(json.JSONDecoder().raw_decode(text)[0]):
                return graph
        raise ValueError(f"{self.path}: expected a RadGraph record at byte {start}")


# ---- models that the user may have; they run on this machine
class CheXbert:
    """The published CheXbert labeler: BERT-base, 13 heads of 4 classes and one of 2 (No Finding).

    checkpoint: its chexbert.pth, in which nothing may be missing or unknown. bert-base-uncased's
    tokenizer comes from the same folder (vocab.txt), else from the hub. Raises ValueError if either
    cannot be had. Called with a list of texts, it returns a list of labels.
    """
    def __init__(self, checkpoint, batch_size=32):
        import pickle

        import torch
        from transformers import BertConfig, BertModel, BertTokenizer
        try:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            saved = saved.get("model_state_dict", saved)
            state = {name.removeprefix("module."): value for name, value in saved.items()
                     if not name.endswith(".position_ids")}
            layer = [k.split(".")[3] for k in state if k.startswith("bert.encoder.layer.")]
            words, width = state["bert.embeddings.word_embeddings.weight"].shape
            config = BertConfig(
                vocab_size=words, hidden_size=width, num_hidden_layers=len(set(layer)),
                num_attention_heads=max(1, width // 64),
                intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
                max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]))
            heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in [4] * 13 + [2])
            self.net = torch.nn.ModuleDict({"bert": BertModel(config), "linear_heads": heads})
            self.net.load_state_dict(state)
        except (KeyError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            unsafe = isinstance(error, pickle.UnpicklingError)
            reason = "not plain tensors" if unsafe else " ".join(str(error).split())[:200]
            raise ValueError(f"{checkpoint}: expected CheXbert's weights ({reason})") from None
        folder = Path(checkpoint).resolve().parent
        source = folder if (folder / "vocab.txt").is_file() else "bert-base-uncased"
        try:
            self.tokenizer = BertTokenizer.from_pretrained(source, do_lower_case=True)
        except (OSError, ValueError):
            self.tokenizer = ()
        if len(self.tokenizer) != words:  # offline, transformers may also return one without words
            raise ValueError(f"{folder}: expected vocab.txt of bert-base-uncased, {words} words; "
                             "the hub gave none either")
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net.eval().to(self.device)

    def __call__(self, texts):
        import torch
        out, order = [None] * len(texts), sorted(range(len(texts)), key=lambda i: len(texts[i]))
        most = min(512, self.net["bert"].config.max_position_embeddings)
        for at in range(0, len(order), self.batch_size):
            rows = order[at:at + self.batch_size]
            tokens = self.tokenizer([" ".join(texts[i].split()) for i in rows], padding=True,
                                    truncation=True, max_length=most, return_tensors="pt")
            with torch.inference_mode():
                cls = self.net["bert"](**tokens.to(self.device)).last_hidden_state[:, 0]  # (B, D)
                classes = [head(cls).argmax(1).tolist() for head in self.net["linear_heads"]]
            for i, row in zip(rows, zip(*classes, strict=True), strict=True):
                out[i] = {c: (None, 1, 0, -1)[k] for c, k in zip(CONDITIONS, row, strict=True) if k}
        return out


CLEAN_PROMPT = """\
Rewrite this chest X-ray report so that each sentence states exactly one finding, \
device or denied finding. Leave out comparisons with earlier examinations (stable, new, improved), \
but keep the finding itself. Add nothing. Answer with the sentences alone, one a line.

Report: {}"""
OMIT_PROMPT = """\
Delete from this chest X-ray report whatever concerns "{}", stated or denied. Copy \
all other sentences unchanged. Answer with the remaining sentences alone, one a line.

Report: {}"""


def local_model(name, batch_size=8):
    """generate(prompts) -> answers of an instruct model (folder or hub id) run here, greedy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--llm {name}: expected a folder or hub id of a causal language model "
                         f"({reason})") from None
    if not tokenizer.chat_template:
        raise ValueError(f"--llm {name}: expected an instruct model, with a chat template")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def generate(prompts):
        answers = []
        for at in range(0, len(prompts), batch_size):
            chats = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False,
                                                   add_generation_prompt=True)
                     for p in prompts[at:at + batch_size]]
            tokens = tokenizer(chats, padding=True, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(**tokens.to(device), do_sample=False, max_new_tokens=400,
                                     pad_token_id=tokenizer.pad_token_id)
            new = ids[:, tokens["input_ids"].shape[1]:]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers
    return generate


def _edited(generate, prompts, sources, drafts, stats, step):
    """The model's sentences, if they say what the rules' draft says and bring no new place, grade
    or number; else the draft."""
    out = []
    for answer, source, draft in zip(generate(prompts), sources, drafts, strict=True):
        lines = (_finish(re.sub(r"^[\s*-]+", "", line)) for line in answer.splitlines())
        sentences = [s for line in lines for s in _sentences(line)]
        old, new = ({w for w in _WORD.findall(t.lower()) if w in PLACES | GRADES or w[0].isdigit()}
                    for t in (source, " ".join(sentences)))
        good = bool(sentences) and new <= old and _said(sentences) == _said(draft)
        stats[f"{step}: {'by the model' if good else 'fell back to the rules'}"] += 1
        out.append(sentences if good else draft)
    return out


# ---- records and files
def annotate(record, *, seed=0, label=label_report, graph=None):
    """The rules pipeline for one manifest record; pure, deterministic in (seed, record["id"]).

    label: cleaned text -> labels. graph: r's RadGraph record; else the record's own, else by rule.
    Returns the record with report (cleaned), original_report, labels, graph and hard_negatives: one
    per positive condition that the rules find in the text, CXR-Align's choice first (Sec. 3).
    """
    return _annotate([record], seed, lambda _, texts: list(map(label, texts)), [graph], None,
                     Counter())[0]


def _annotate(records, seed, label, graphs, generate, stats):
    originals = [r.get("original_report", r["report"]) for r in records]
    cleaned = [split_sentences(remove_temporal(text)) for text in originals]  # Fig. 2, i
    if generate:
        prompts = [CLEAN_PROMPT.format(text) for text in originals]
        cleaned = _edited(generate, prompts, originals, cleaned, stats, "clean-up")
    texts, out = [" ".join(sentences) for sentences in cleaned], []
    for i, labels in enumerate(label(records, texts)):
        own = records[i].get("graph") or {}
        own = own if own.get("data_source") != "rules" else None  # not of an earlier run
        out.append(records[i] | {
            "report": texts[i], "original_report": originals[i], "labels": labels,
            "graph": graphs[i] or own or rule_graph(cleaned[i]), "hard_negatives": []})
    rngs = [random.Random(f"{seed}/{r['id']}") for r in records]
    orders = [rng.sample(p, len(p)) for rng, p in zip(rngs, (positives(r["labels"]) for r in out),
                                                      strict=True)]
    jobs = [(i, condition) for i, order in enumerate(orders) for condition in order]
    rests = [_omitted(cleaned[i], condition) for i, condition in jobs]
    if generate:
        prompts = [OMIT_PROMPT.format(condition, texts[i]) for i, condition in jobs]
        rests = _edited(generate, prompts, [texts[i] for i, _ in jobs], rests, stats, "omission")
    for (i, condition), rest in zip(jobs, rests, strict=True):
        if rest == cleaned[i]:
            stats["skipped: positive condition not found in the text"] += 1
            continue
        report, position = _insert(rest, condition, rngs[i])
        out[i]["hard_negatives"].append({
            "condition": condition, "omitted": " ".join(rest) or NOTHING_LEFT, "report": report,
            "position": position, "labels": _negated_labels(out[i]["labels"], condition),
            "graph": negated_graph(out[i]["graph"], condition)})
    return out


def _lines(path):
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def parse_line(where, line):
    """One line of JSON Lines, bytes, as a dict; else ValueError("WHERE: ...")."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # whose message may show the report
        raise ValueError(f"{where}: expected one JSON object in UTF-8") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def read_jsonl(path):
    """Yields (line number, dict) of JSON Lines, but blank ones; ValueError names file and line."""
    for number, line in _lines(path):
        yield number, parse_line(f"{path}:{number}", line)


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Opens a temporary file beside path, renamed at the end: path is never half written."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder {Path(path).parent} to write to")
    handle, name = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(handle, mode, **text) as file:
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
    except BrokenPipeError:  # whoever read our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def minimum(bound, kind=int):
    """An argparse type: a finite number of at least `bound`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if bound <= (value := kind(text)) < float("inf"):
                return value
        raise argparse.ArgumentTypeError(f"expected a{' whole' * (kind is int)} number of at least "
                                         f"{bound}, got {text}")
    return parse


_TOOLS = {}  # of this process: path, seed, labeler, generate, graphs


def _start_worker(tools):
    _TOOLS.update(tools)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    leave_with_parent()


def leave_with_parent():
    """For a worker process: end when the parent was killed, instead of waiting for it forever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def _checked(path, number, line, labeler):
    where = f"{path}:{number}"
    record = parse_line(where, line)
    if not all(isinstance(record.get(key), str) for key in ("id", "report")):
        raise ValueError(f"{where}: expected the strings id and report")
    if not isinstance(record.get("original_report", ""), str):
        raise ValueError(f"{where}: expected original_report as text")
    if record.get("graph"):
        record["graph"] = _whole_graph(record["graph"])
        if not record["graph"]:
            raise ValueError(f"{where}: expected graph as RadGraph's text and entities, each with "
                             "tokens, label, start_ix, end_ix and relations")
    if record["id"].startswith("cxr-align/"):
        raise ValueError(f"{where}: CXR-Align's own r^r and r^n would be overwritten; "
                         "evaluate.py takes the file as it is")
    labels = record.get("labels")
    if labeler == "given" and not (isinstance(labels, dict) and all(
            c in CONDITIONS and v in (1, 0, -1) for c, v in labels.items())):
        raise ValueError(f"{where}: --labeler given expects labels of 1, 0 or -1 by name")
    return record


def _chunk(lines):
    """Annotates (number, line) pairs: (the bytes to write, counts)."""
    path, labeler, graphs, stats = *(_TOOLS[k] for k in ("path", "labeler", "graphs")), Counter()
    records = [_checked(path, number, line, labeler) for number, line in lines]
    given = [graphs and graphs.get(r, n) for (n, _), r in zip(lines, records, strict=True)]
    stats["graphs: not in the file, made by rule"] += given.count(None) if graphs else 0

    def label(records, texts):
        if labeler == "given":
            return [r["labels"] for r in records]
        return list(map(label_report, texts)) if labeler == "rules" else labeler(texts)

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


def _resume(part, settings, stats):
    """Counts the records in the .part file of an interrupted run, which had the same settings."""
    note = Path(f"{part}.json")
    if not (note.exists() and part.exists() and part.stat().st_size):  # nothing to go on from
        part.write_bytes(b"")
        note.write_text(json.dumps(settings))
    before = json.loads(note.read_text())
    changed = sorted(key for key in settings if before.get(key) != settings[key])
    if changed:
        raise ValueError(f"{part}: left by an interrupted run with other {', '.join(changed)}; "
                         "delete it to start afresh")
    size = 0
    with open(part, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            size += len(line)
            _count(json.loads(line), stats)
        file.truncate(size)
    return stats["studies"]


def stream(function, jobs, workers, **tools):
    """function over jobs, in order, in so many processes (below 2: in this one); few jobs at once,
    so that memory stays flat. tools: what the function finds in _TOOLS."""
    if workers < 2:
        _TOOLS.update(tools)
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tools,)) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            yield from (future.result() for future in waiting)
        except BrokenExecutor:
            raise OSError("a reading process was killed; if memory is short, lower --workers"
                          ) from None


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("manifest", metavar="IN.jsonl", help="from data.py; needs id and report")
    add("--out", required=True, metavar="OUT.jsonl", help="the manifest to write")
    add("--labeler", choices=("rules", "chexbert", "given"), default="rules",
        help="given: the manifest's labels, as from MIMIC's and CheXpert's own tables")
    add("--chexbert", metavar="CKPT", help="chexbert.pth, for --labeler chexbert")
    add("--llm", metavar="MODEL", help="local instruct model that edits; the rules check it")
    add("--graphs", default="rules", metavar="rules|FILE.json", help="RadGraph's file, or by rule")
    add("--seed", type=minimum(0), default=0,
        help="draws order, phrasing and position of the denials")
    add("--workers", type=minimum(0), default=os.cpu_count() or 1,
        help="processes, where rules label")
    args = parser.parse_args(argv)
    if (args.labeler == "chexbert") != bool(args.chexbert):
        raise ValueError("--labeler chexbert and --chexbert CKPT go together")
    return args


def main(argv=None):
    args = parse_args(argv)
    from tqdm import tqdm
    graphs = None if args.graphs == "rules" else args.graphs
    files = [Path(f).resolve() for f in (args.manifest, graphs, args.chexbert) if f]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "manifest")} | {
        "input": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    if Path(args.out).resolve() in files or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: expected a file, another than those that are read")
    # Every line is read once before, so that a bad one stops the run here and not after hours.
    lines = sum(1 for n, line in _lines(args.manifest)
                if _checked(args.manifest, n, line, args.labeler))
    began, total, part = time.time(), Counter(), Path(f"{args.out}.part")
    tools = {"path": args.manifest, "seed": args.seed, "graphs": graphs and GraphFile(graphs),
             "labeler": CheXbert(args.chexbert) if args.chexbert else args.labeler,
             "generate": args.llm and local_model(args.llm)}
    done = _resume(part, settings, total)
    todo = itertools.islice(_lines(args.manifest), done, None)
    chunks = iter(lambda: list(itertools.islice(todo, 64)), [])
    workers = 1 if args.llm or args.chexbert else args.workers
    with open(part, "ab") as file, tqdm(total=lines, unit=" studies", initial=done,
                                        disable=None) as bar:
        for data, counts in stream(_chunk, chunks, workers, **tools):
            file.write(data)
            total += counts
            bar.update(counts["studies"])
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, args.out)
    os.unlink(f"{part}.json")
    names = ["studies", "with hard negatives", *(f"positive: {c}" for c in CONDITIONS[:-1])]
    for name in [*names, *sorted(n for n in total if total[n] and n not in names)]:
        print(f"{name:52s}{total[name]:10,d}")
    speed = (total["studies"] - done) / (time.time() - began)
    if done:
        print(f"resumed after {done:,} studies; what was skipped or fell back is of the others")
    print(f"{'studies per second':52s}{speed:10,.0f}")


if __name__ == "__main__":
    run_main(main)
